"""What a state dict holds beside parameters: BatchNorm statistics, which mix, and tables, which do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.errors import CheckpointError
from fedmerge.merging.bank.layout import Parts, StateDict

POLICIES = ("linear", "moment")


@dataclass(frozen=True)
class Buffers:
    """stacked: name -> (K + A, features), means and variances of every BatchNorm in `pairs`, experts first and then anchors.

    experts: K. fixed: name -> tensor, the same for every mixture.
    policy: "linear" mixes variances as v = sum a_k v_k, as a mean of state dicts does; "moment" gives the variance of the mixture,
    v = sum a_k (v_k + mu_k^2) - mu^2.
    """

    pairs: tuple[tuple[str, str], ...]
    stacked: dict[str, Tensor]
    fixed: dict[str, Tensor]
    experts: int
    policy: str = "linear"

    @staticmethod
    def of(states: Sequence[StateDict], experts: int, parts: Parts, like: Tensor, policy: str) -> Buffers:
        """Collect the buffers of K experts' states and then of anchors'. Raises CheckpointError if a table differs."""
        if policy not in POLICIES:
            raise CheckpointError(f"BatchNorm variance policy: found '{policy}'; expected one of {', '.join(POLICIES)}")
        stacked = {name: torch.stack([state[name].to(like) for state in states]) for pair in parts.statistics for name in pair}
        source = states[min(experts, len(states) - 1)]  # theta_0's where it is given
        for name in parts.fixed:
            counts_batches = name.endswith("num_batches_tracked")
            if not counts_batches and any(not torch.equal(state[name], source[name]) for state in states):
                raise CheckpointError(f"buffer {name} differs between experts; expected one table, the same for all")
        fixed = {name: _placed(source[name], like) for name in parts.fixed}
        return Buffers(parts.statistics, stacked, fixed, experts, policy)

    def of_row(self, k: int) -> dict[str, Tensor]:
        """The buffers of expert or anchor k, as views."""
        return {name: tensor[k] for name, tensor in self.stacked.items()} | self.fixed

    def merged(self, coefficients: Tensor | None = None) -> dict[str, Tensor]:
        """The buffers of a mixture. coefficients: (K,) or (K + A,), summing to 1; None is 1/K for each expert."""
        return self.fixed | self.statistics(None if coefficients is None else coefficients)

    def statistics(self, coefficients: Tensor | None) -> dict[str, Tensor]:
        """BatchNorm means and variances (features,) of a mixture, or (N, features) of one mixture for each row of (N, K)."""
        state: dict[str, Tensor] = {}
        for mean, variance in self.pairs:
            mu, v = self.stacked[mean], self.stacked[variance]
            a = mu.new_full((self.experts,), 1 / self.experts) if coefficients is None else coefficients.to(mu)
            used = torch.nonzero(a.reshape(-1, a.shape[-1]).any(0)).flatten()  # a broken expert must not spoil 0 times itself
            a, mu, v = a[..., used], mu[used], v[used]
            second = v + mu**2 if self.policy == "moment" else v
            state[mean] = a @ mu
            state[variance] = a @ second - (state[mean] ** 2 if self.policy == "moment" else 0)
        return state


def _placed(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(device=like.device, dtype=like.dtype if tensor.is_floating_point() else tensor.dtype)
