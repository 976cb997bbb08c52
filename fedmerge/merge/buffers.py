"""What a state dict holds beside parameters: BatchNorm statistics, which mix, and tables, which do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.errors import CheckpointError
from fedmerge.merge.parts import Parts, StateDict

POLICIES = ("linear", "moment")


@dataclass(frozen=True)
class Buffers:
    """means, variances: name -> (K, features), of every BatchNorm. fixed: name -> tensor, the same for every mixture.

    policy: "linear" mixes variances as v = sum a_k v_k, as a mean of state dicts does; "moment" gives the variance of the mixture,
    v = sum a_k (v_k + mu_k^2) - mu^2.
    """

    pairs: tuple[tuple[str, str], ...]
    stacked: dict[str, Tensor]
    fixed: dict[str, Tensor]
    policy: str = "linear"

    @staticmethod
    def of(states: Sequence[StateDict], base: StateDict | None, parts: Parts, like: Tensor, policy: str) -> Buffers:
        """Collect the buffers of K state dicts. Raises CheckpointError if a table differs between experts."""
        if policy not in POLICIES:
            raise CheckpointError(f"BatchNorm variance policy: found '{policy}'; expected one of {', '.join(POLICIES)}")
        stacked = {name: torch.stack([state[name].to(like) for state in states]) for pair in parts.statistics for name in pair}
        source = base if base is not None else states[0]
        for name in parts.fixed:
            counts_batches = name.endswith("num_batches_tracked")
            if not counts_batches and any(not torch.equal(state[name], source[name]) for state in states):
                raise CheckpointError(f"buffer {name} differs between experts; expected one table, the same for all")
        fixed = {name: _placed(source[name], like) for name in parts.fixed}
        return Buffers(parts.statistics, stacked, fixed, policy)

    def of_expert(self, k: int) -> dict[str, Tensor]:
        """The buffers of expert k, as views."""
        return {name: tensor[k] for name, tensor in self.stacked.items()} | self.fixed

    def merged(self, coefficients: Tensor | None = None) -> dict[str, Tensor]:
        """The buffers of a mixture. coefficients: (K,) on the simplex; None is 1/K each, for rules that are not convex."""
        state = dict(self.fixed)
        for mean, variance in self.pairs:
            mu, v = self.stacked[mean], self.stacked[variance]  # (K, features)
            a = torch.full_like(mu[:, 0], 1 / len(mu)) if coefficients is None else coefficients.to(mu)
            used = a != 0
            state[mean] = a[used] @ mu[used]
            second = v[used] + mu[used] ** 2 if self.policy == "moment" else v[used]
            state[variance] = a[used] @ second - (state[mean] ** 2 if self.policy == "moment" else 0)
        return state


def _placed(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(device=like.device, dtype=like.dtype if tensor.is_floating_point() else tensor.dtype)
