"""Task vectors thinned at random and rescaled, then added or merged by sign."""

from __future__ import annotations

import random
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes
from fedmerge.merging.methods._base import Static
from fedmerge.merging.methods.ties import KEEP, disjoint_merge, trim


class Dare(Static):
    """tau'_k = m_k tau_k / (1 - p), m_k ~ Bernoulli(1 - p) for each entry; then theta = theta_0 + s sum_k tau'_k, or TIES.

    The mask of an expert is drawn from the seed and its name, so the order of experts does not matter.
    Worked example: p = 0.5, tau = (2, 4), mask (1, 0): tau' = (4, 0), whose expectation over masks is tau.
    """

    paper: ClassVar[str] = "Yu et al., Language models are super Mario (DARE), ICML 2024"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    drop: float = Field(0.5, ge=0, lt=1, description="p, the probability that an entry is dropped")
    then: Literal["task_arithmetic", "ties"] = Field("task_arithmetic", description="what merges the thinned task vectors")
    keep: float = Field(0.2, ge=0, le=1, validation_alias=KEEP, description="share that survives the trimming of TIES")
    scale: float = Field(0.3, ge=0, le=2, description="s, the scale of task vectors")
    seed: int = Field(0, ge=0, description="of the masks")

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        if self.then == "ties":
            thinned = [trim(self._thinned(name, bank.task_vector(k)), self.keep) for k, name in enumerate(bank.names)]
            merged = disjoint_merge(torch.stack(thinned), "mean")
        else:
            merged = bank.summed(self._thinned)
        return bank.anchor_row("theta_0") + self.scale * merged

    def working_bytes(self, sizes: Sizes) -> int:
        """For TIES, the thinned task vectors of all experts, and what disjoint merging makes of them."""
        return 4 * 4 * sizes.experts * sizes.parameters if self.then == "ties" else 0

    @property
    def whole(self) -> bool:
        """For TIES: signs are elected over all thinned task vectors."""
        return self.then == "ties"

    def _thinned(self, name: str, tau: Tensor) -> Tensor:
        mask = torch.rand(len(tau), generator=draws(self.seed, name), dtype=torch.float64) >= self.drop
        return tau * mask.to(tau.device) / (1 - self.drop)


def draws(seed: int, name: str) -> torch.Generator:
    """What decides which of an expert's parameters are dropped: one number in [0, 1) for each, in the order of columns."""
    return torch.Generator().manual_seed(random.Random(f"dare {seed} {name}").getrandbits(63))
