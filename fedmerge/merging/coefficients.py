"""A bound on coefficients: no expert may be more than a part of a merge."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coefficients:
    """Weights of the experts, for encoder and head separately.

    Rows sum to 1, on the simplex unless the method says otherwise. With the bank's A anchors they are (K + A,) or (N, K + A).

    Attributes
    ----------
    encoder : Tensor
        (K,) for one merge per batch, or (N, K) for one per sample.
    head : Tensor
        As encoder, (K,) or (N, K).
    notes : dict[str, list[float]], optional
        What the method saw on the way (entropies in nats, chosen expert), for the run folder.
    of : Literal['weights', 'predictions'], default 'weights'
        What they weigh; with "predictions", the experts' probabilities are mixed by `encoder`, and no model is merged.
    scale : Tensor, optional
        (K,), what each expert's head, and so its logits, is divided by before it is mixed; None for 1.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.coefficients import Coefficients
    >>> even = torch.tensor([0.5, 0.5])
    >>> found = Coefficients(encoder=even, head=torch.tensor([0.9, 0.1]), notes={"entropy": [0.1, 0.4]})
    >>> found.of, found.head.tolist() == found.encoder.tolist()
    ('weights', False)
    """

    encoder: Tensor
    head: Tensor
    notes: dict[str, list[float]] = field(default_factory=dict)
    of: Literal["weights", "predictions"] = "weights"
    scale: Tensor | None = None

    def on_one_scale(self) -> Coefficients:
        """The same with the head's coefficients divided by the scale, so that rows of the head need not sum to 1."""
        if self.scale is None:
            return self
        anchors = self.scale.new_ones(self.head.shape[-1] - len(self.scale))
        return replace(self, head=self.head / torch.cat([self.scale, anchors]), scale=None)


SLACK = 1 + 1e-6
"""What rounding may add before it counts as above."""


def capped(alpha: Tensor, most: float) -> Tensor:
    """Coefficients with none above a share of their sum, and the same sum.

    What is cut off goes to the others in proportion to theirs, or in equal parts if they have nothing, until nobody is above.
    Worked example: (0.8, 0.15, 0.05), most 0.6: 0.2 is shared 3 to 1, (0.6, 0.3, 0.1).

    Parameters
    ----------
    alpha : Tensor
        Coefficients (..., K), not negative.
    most : float
        Largest share of the sum, in (0, 1]; below 1/K it counts as 1/K.

    Returns
    -------
    Tensor
        (..., K).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.coefficients import capped
    >>> capped(torch.tensor([0.8, 0.15, 0.05]), most=0.6)
    tensor([0.6000, 0.3000, 0.1000])
    """
    K, total = alpha.shape[-1], alpha.sum(-1, keepdim=True)
    bound = max(most, 1 / K) * total
    if bool((alpha <= SLACK * bound).all()):
        return alpha
    full = torch.zeros_like(alpha, dtype=torch.bool)
    found = alpha.clone()
    for _ in range(K):  # at least one more is full after every round
        over = (found > SLACK * bound) & ~full
        if not bool(over.any()):
            break
        full |= over
        left = total - (bound * full).sum(-1, keepdim=True)
        rest = torch.where(full, 0, alpha)
        among = rest.sum(-1, keepdim=True)
        equal = (~full).to(alpha) / (~full).sum(-1, keepdim=True).clamp(min=1)
        share = torch.where(among > 0, rest / torch.where(among > 0, among, 1), equal)
        found = torch.where(full, bound, left * share)
    return found


def cap(found: Coefficients, experts: int, most: float | None) -> Coefficients:
    """Coefficients of encoder and head, each capped among the experts; anchors keep theirs.

    Parameters
    ----------
    found : Coefficients
        The coefficients.
    experts : int
        K; entries after the first K are anchors'.
    most : float | None
        Largest share, in (0, 1]; None leaves everything as it is.

    Returns
    -------
    Coefficients
        New coefficients, or the same object.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.coefficients import Coefficients, cap
    >>> alpha = torch.tensor([0.8, 0.15, 0.05])
    >>> cap(Coefficients(alpha, alpha), experts=3, most=0.6).head
    tensor([0.6000, 0.3000, 0.1000])
    """
    if most is None:
        return found

    def part(alpha: Tensor) -> Tensor:
        return torch.cat([capped(alpha[..., :experts], most), alpha[..., experts:]], -1)

    return replace(found, encoder=part(found.encoder), head=part(found.head))
