"""What a state dict holds beside parameters: BatchNorm statistics, which mix, and tables, which do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedmerge.errors import CheckpointError
from fedmerge.merging.bank.layout import Parts, StateDict

POLICIES = ("linear", "moment")

CONVEX = 1e-3
"""What rounding, also that of half precision, may take from a row of coefficients before it no longer counts as convex."""

DEVIATIONS = 2**22
"""Squared deviations (N, K, features) that are held at a time."""


@dataclass(frozen=True)
class Buffers:
    """What a state holds beside parameters: BatchNorm statistics, which are mixed, and all else, which is not.

    Attributes
    ----------
    pairs : tuple[tuple[str, str], ...]
        Names of the mean and of the variance of every BatchNorm.
    moments : Tensor
        (2, K + A, features): means and variances of all BatchNorms side by side, in the order of `pairs`; experts first and then
        anchors. So a mixture takes as many operations for fifty layers as for one.
    features : list[int]
        How many features each BatchNorm has.
    fixed : dict[str, Tensor]
        Name -> tensor, the same for every mixture: tables, and theta_0's counts of batches.
    experts : int
        K.
    counts : dict[str, Tensor]
        Name -> (K + A,), the counts of each state by itself.
    policy : str, default 'linear'
        "linear" mixes variances as v = sum a_k v_k, as a mean of state dicts does; "moment" gives the variance of the mixture, v
        = sum a_k (v_k + mu_k^2) - mu^2.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 2))
    >>> states = [{**model.state_dict(), "0.running_mean": torch.tensor([mean])} for mean in (0.0, 4.0)]
    >>> buffers = Bank.of(model, states).buffers
    >>> buffers.merged(torch.tensor([0.75, 0.25]))["0.running_mean"]
    tensor([1.])
    """

    pairs: tuple[tuple[str, str], ...]
    moments: Tensor
    features: list[int]
    fixed: dict[str, Tensor]
    experts: int
    counts: dict[str, Tensor]
    policy: str = "linear"

    @staticmethod
    def of(states: Sequence[StateDict], experts: int, parts: Parts, like: Tensor, policy: str) -> Buffers:
        """Collect the buffers of K experts' states and then of anchors'. Raises CheckpointError if a table differs."""
        if policy not in POLICIES:
            raise CheckpointError(f"BatchNorm variance policy: found '{policy}'; expected one of {', '.join(POLICIES)}")
        features = [states[0][mean].numel() for mean, _ in parts.statistics]
        none = like.new_empty(0)  # where no layer is a BatchNorm
        rows = [[torch.cat([none, *(state[pair[i]].to(like) for pair in parts.statistics)]) for state in states] for i in (0, 1)]
        moments = torch.stack([torch.stack(of_all) for of_all in rows])
        source = states[min(experts, len(states) - 1)]  # theta_0's where it is given
        counting = [name for name in parts.fixed if name.endswith("num_batches_tracked")]
        for name in parts.fixed:
            if name not in counting and any(not torch.equal(state[name], source[name]) for state in states):
                raise CheckpointError(f"buffer {name}: found a table that differs between experts; expected the same table in all")
        fixed = {name: _placed(source[name], like) for name in parts.fixed}
        counts = {name: torch.stack([_placed(state[name], like) for state in states]) for name in counting}
        return Buffers(parts.statistics, moments, features, fixed, experts, counts, policy)

    @cached_property
    def stacked(self) -> dict[str, Tensor]:
        """Name -> (K + A, features), views of `moments`."""
        return self._by_name(*self.moments)

    def of_row(self, k: int) -> dict[str, Tensor]:
        """The buffers of expert or anchor k, as views."""
        return self.fixed | {name: tensor[k] for name, tensor in (self.stacked | self.counts).items()}

    def merged(self, coefficients: Tensor | None = None) -> dict[str, Tensor]:
        """The buffers of a mixture. coefficients: (K,) or (K + A,), as in `statistics`; a one-hot row gives that state's own."""
        if coefficients is not None and (row := one_hot(coefficients)) is not None:
            return self.of_row(row)
        return self.fixed | self.statistics(coefficients)

    def statistics(self, coefficients: Tensor | None) -> dict[str, Tensor]:
        """BatchNorm means and variances (features,) of a mixture, or (N, features) of one mixture for each row of (N, K).

        None is 1/K for each expert, and so is a row that is not convex: a variance must never be extrapolated.
        """
        if not self.pairs:
            return {}
        mu, v = self.moments
        a = self._convex(coefficients, mu)
        used = torch.nonzero(a.reshape(-1, a.shape[-1]).any(0)).flatten()  # a broken expert must not spoil 0 times itself
        a, mu, v = a[..., used], mu[used], v[used]
        mean, variance = a @ mu, a @ v
        if self.policy == "moment":  # by deviations: squares of large means would leave nothing of a small variance, or less
            width = max(1, DEVIATIONS // max(1, a.numel()))
            pieces = zip(torch.split(mu, width, -1), torch.split(mean, width, -1), strict=True)
            variance = variance + torch.cat([(a[..., None] * (k - m[..., None, :]) ** 2).sum(-2) for k, m in pieces], -1)
        alone = (a == 1).any(-1, keepdim=True)  # squares would cost such a row its last bits
        return self._by_name(mean, torch.where(alone, v[a.argmax(-1)], variance))

    def _by_name(self, means: Tensor, variances: Tensor) -> dict[str, Tensor]:
        """Views of means and variances (..., features) by the names of `pairs`."""
        split = (torch.split(values, self.features, -1) for values in (means, variances))
        return {name: view for pair, *views in zip(self.pairs, *split, strict=True) for name, view in zip(pair, views, strict=True)}

    def _convex(self, a: Tensor | None, like: Tensor) -> Tensor:
        """Rows (..., K) as they are if they are convex, else, and for None, 1/K for each expert."""
        if a is None:
            return like.new_full((self.experts,), 1 / self.experts)
        a = a.to(like.device)
        convex = (a >= -CONVEX).all(-1, keepdim=True) & ((a.sum(-1, keepdim=True) - 1).abs() < CONVEX)
        uniform = (torch.arange(a.shape[-1], device=a.device) < self.experts).to(like) / self.experts
        return torch.where(convex, a.to(like), uniform)


def one_hot(coefficients: Tensor) -> int | None:
    """The row whose coefficient is 1 while all others are 0.

    Parameters
    ----------
    coefficients : Tensor
        (K,) or (K + A,).

    Returns
    -------
    int | None
        The row's number, or None if there is no such row.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.buffers import one_hot
    >>> one_hot(torch.tensor([0.0, 1.0])), one_hot(torch.tensor([0.5, 0.5]))
    (1, None)
    """
    used = [(k, weight) for k, weight in enumerate(coefficients.tolist()) if weight != 0]
    return used[0][0] if len(used) == 1 and used[0][1] == 1 else None


def _placed(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(device=like.device, dtype=like.dtype if tensor.is_floating_point() else tensor.dtype)
