"""How far experts have drifted apart, block by block, and what is left of them in their mean. From weights alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.merging.bank.bank import Bank


@dataclass(frozen=True)
class Drift:
    """How far experts have moved apart, for L blocks in the model's order, the head last. All in float64.

    Attributes
    ----------
    blocks : tuple[str, ...]
        Their names.
    norms : Tensor
        (L, K).
    angles : Tensor
        (L, K, K), degrees in [0, 180], the diagonal 0.
    attenuation : Tensor
        (L,) in [0, 1], the norm of the mean over the mean of the norms.
    relative : bool
        Whether of what training changed (theta_k - theta_0), and not of the weights themselves.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.geometry.drift import drift
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [4.0, -1.0], [2.0, 3.0]))
    >>> bank = Bank.of(model, {"axial": a, "coronal": b}, start)
    >>> found = drift(bank, relative=True)
    >>> found.mean_angle  # degrees
    tensor([70.3462], dtype=torch.float64)
    >>> found.predicted, found.attenuation
    (tensor([0.8174], dtype=torch.float64), tensor([0.8183], dtype=torch.float64))
    """

    blocks: tuple[str, ...]
    norms: Tensor
    angles: Tensor
    attenuation: Tensor
    relative: bool

    @property
    def K(self) -> int:  # noqa: N802 - the papers' symbol
        """Number of experts."""
        return self.norms.shape[1]

    @property
    def mean_angle(self) -> Tensor:
        """(L,), degrees, over all pairs; 0 for one expert."""
        pairs = self.K * (self.K - 1)
        return self.angles.sum((1, 2)) / pairs if pairs else self.angles.sum((1, 2))

    @property
    def norm_ratio(self) -> Tensor:
        """(L,): mean over pairs of max(r, 1/r), r = ||theta_i|| / ||theta_j||; 1 where all norms are equal."""
        large = torch.maximum(self.norms[:, :, None], self.norms[:, None])
        small = torch.minimum(self.norms[:, :, None], self.norms[:, None])
        ratio = torch.where(small > 0, large / small, torch.where(large > 0, torch.inf, 1.0))
        pairs = self.K * (self.K - 1)
        return (ratio.sum((1, 2)) - self.K) / pairs if pairs else ratio[:, 0, 0]

    @property
    def predicted(self) -> Tensor:
        """(L,): the attenuation of K vectors of equal norm and equal angle, sqrt((1 + (K - 1) cos) / K); cos(angle / 2) for two."""
        cosine = torch.cos(torch.deg2rad(self.mean_angle))
        return ((1 + (self.K - 1) * cosine) / self.K).clamp(min=0).sqrt()

    @property
    def agreement(self) -> Tensor:
        """(L,): 1 where experts agree, 0 where they are orthogonal (attenuation 1 / sqrt(K)), negative where they cancel out."""
        if self.K == 1:
            return torch.ones_like(self.attenuation)
        unrelated = 1 / math.sqrt(self.K)
        return (self.attenuation - unrelated) / (1 - unrelated)


def drift(bank: Bank, relative: bool) -> Drift:
    """Angles, norms and attenuation of every block of the model.

    Parameters
    ----------
    bank : Bank
        The experts.
    relative : bool
        Whether of theta_k - theta_0, and not of the weights themselves; the bank must have been made with a base.

    Returns
    -------
    Drift
        The three figures, block by block.

    Raises
    ------
    CheckpointError
        If `relative` and the bank has no base.

    References
    ----------
    Ambekar et al., The mean is the mirage, 2026, section 4.1 and figure 2.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.geometry.drift import drift
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [4.0, -1.0], [2.0, 3.0]))
    >>> bank = Bank.of(model, {"axial": a, "coronal": b}, start)
    >>> found = drift(bank, relative=True)
    >>> found.blocks
    ('head',)
    >>> found.angles.round(decimals=1)
    tensor([[[ 0.0000, 70.3000],
             [70.3000,  0.0000]]], dtype=torch.float64)
    """
    X = bank.theta.double()
    if relative:
        X = X - bank.rows[bank.anchor("theta_0")].double()
    groups = parameter_blocks(bank)
    parts = [torch.cat([X[:, columns] for columns in columns_of], 1) for columns_of in groups.values()]
    norms = torch.stack([part.norm(dim=1) for part in parts])
    means = torch.stack([part.mean(0).norm() for part in parts])
    usual = norms.mean(1)
    return Drift(
        blocks=tuple(groups),
        norms=norms,
        angles=torch.stack([angles(part) for part in parts]),
        attenuation=torch.where(usual > 0, means / usual, 1.0),
        relative=relative,
    )


def angles(X: Tensor) -> Tensor:
    """Angles between rows; 0 where a row is zero. Accurate for small angles too.

    2 atan2(||u - v||, ||u + v||) for unit vectors u and v: arccos loses half the digits near 0.

    Parameters
    ----------
    X : Tensor
        (K, p).

    Returns
    -------
    Tensor
        (K, K), degrees in [0, 180].

    References
    ----------
    Kahan, How futile are mindless assessments of roundoff, 2006.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.geometry.drift import angles
    >>> angles(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).round(decimals=4)
    tensor([[ 0., 45.],
            [45.,  0.]])
    """
    norms = X.norm(dim=1, keepdim=True)
    U = torch.where(norms > 0, X / norms, 0.0)
    apart = torch.stack([(U - row).norm(dim=1) for row in U])
    together = torch.stack([(U + row).norm(dim=1) for row in U])
    found = torch.rad2deg(2 * torch.atan2(apart, together))
    known = (norms[:, 0] > 0)[:, None] & (norms[:, 0] > 0)
    return torch.where(known, found, 0.0).fill_diagonal_(0)


def parameter_blocks(bank: Bank) -> dict[str, list[slice]]:
    """Columns of each block of the model, the head last.

    A block is a name up to its last number ("blocks.3"), or its first word.

    Parameters
    ----------
    bank : Bank
        The experts.

    Returns
    -------
    dict[str, list[slice]]
        Block's name -> its columns of theta.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.geometry.drift import parameter_blocks
    >>> model = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(3)))
    >>> parameter_blocks(Bank.of(model, [model.state_dict()]))
    {'0': [slice(0, 4, None)], '1': [slice(4, 8, None)], 'head': [slice(8, 12, None)]}
    """
    found: dict[str, list[slice]] = {}
    for name in bank.parts.encoder:
        found.setdefault(_block(name.split(".")), []).append(bank.slices[name])
    found["head"] = [bank.head]
    return found


def _block(words: Sequence[str]) -> str:
    numbers = [position for position, word in enumerate(words) if word.isdigit()]
    return ".".join(words[: numbers[-1] + 1]) if numbers else words[0]
