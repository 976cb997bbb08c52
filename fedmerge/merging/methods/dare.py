"""Task vectors thinned at random and rescaled, then added or merged by sign."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import block, pieces
from fedmerge.merging.methods._base import Static
from fedmerge.merging.methods.ties import KEEP, above, by_sign, threshold


class Dare(Static):
    """tau'_k = m_k tau_k / (1 - p), m_k ~ Bernoulli(1 - p) for each entry; then theta = theta_0 + s sum_k tau'_k, or TIES.

    The mask of an expert is drawn from the seed and its name, so the order of experts does not matter.
    Worked example: p = 0.5, tau = (2, 4), mask (1, 0): tau' = (4, 0), whose expectation over masks is tau.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [4.0, -1.0], [2.0, 3.0]))
    >>> fedmerge.merge(model, [a, b], "dare", base=start, drop=0.5, scale=1, seed=1)["weight"]
    tensor([[8., 6.]])
    """

    paper: ClassVar[str] = "Yu et al., Language models are super Mario (DARE), ICML 2024"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    drop: float = Field(0.5, ge=0, lt=1, description="p, the probability that an entry is dropped")
    then: Literal["task_arithmetic", "ties"] = Field("task_arithmetic", description="rule that merges the thinned task vectors")
    keep: float = Field(0.2, ge=0, le=1, validation_alias=KEEP, description="share of entries that TIES keeps")
    scale: float = Field(0.3, ge=0, le=2, description="s, the scale of task vectors")
    seed: int = Field(0, ge=0, description="seed of the masks")

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        if self.then == "ties":
            floor = bank.each(self._least)
            return by_sign(bank, self._trimmed(bank, floor), "mean", self.scale)
        return bank.summed(self._thinned).mul_(self.scale).add_(bank.anchor_row("theta_0"))

    def _least(self, name: str, tau: Tensor) -> Tensor:
        return threshold(self._thinned(name, tau), self.keep)

    def _trimmed(self, bank: Bank, floor: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Thinned task vectors without what is below the floors (K,), in parts: (columns, (K, width))."""
        generators = [draws(self.seed, name) for name in bank.names]
        for columns in pieces(bank):
            tau = bank.taus(columns)
            for row, generator in zip(tau, generators, strict=True):
                self._thin(row, generator)
            yield columns, above(tau, floor)

    def _thinned(self, name: str, tau: Tensor) -> Tensor:
        """tau'_k (P,), written over tau, a part at a time."""
        generator = draws(self.seed, name)
        for part in torch.split(tau, block(tau, 2)):
            self._thin(part, generator)
        return tau

    def _thin(self, tau: Tensor, generator: torch.Generator) -> None:
        m = torch.rand(len(tau), generator=generator, dtype=torch.float64).ge_(self.drop)  # 1 and 0 as numbers
        tau.mul_(m.to(tau)).div_(1 - self.drop)


def draws(seed: int, name: str) -> torch.Generator:
    """The random numbers that decide which of an expert's parameters are dropped: one in [0, 1) for each, in the order of columns.

    Parameters
    ----------
    seed : int
        Of the method.
    name : str
        The expert's.

    Returns
    -------
    torch.Generator
        A generator that nobody else draws from.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.dare import draws
    >>> first, again, other = (torch.rand(3, generator=draws(0, name)) for name in ("axial", "axial", "coronal"))
    >>> torch.equal(first, again), torch.equal(first, other)
    (True, False)
    """
    return torch.Generator().manual_seed(random.Random(f"dare {seed} {name}").getrandbits(63))
