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
    p is rounded to a multiple of 2^-16, in the mask and in the division alike, so that the expectation of tau'_k stays tau_k.
    Worked example: p = 0.5, tau = (2, 4), mask (1, 0): tau' = (4, 0), whose expectation over masks is tau.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [4.0, -1.0], [2.0, 3.0]))
    >>> fedmerge.merge(model, [a, b], "dare", base=start, drop=0.5, scale=1, seed=7)["weight"]
    tensor([[8., 4.]])
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
        scale = self.scale * float(rescaling(self._cut()))
        if self.then == "ties":
            floor = bank.each(self._least)
            return by_sign(bank, ((columns, above(tau, floor)) for columns, tau in self._thinned(bank)), "mean", scale)
        theta_0, out = bank.anchor_row("theta_0"), bank.blank(bank.wide)
        for columns, tau in self._thinned(bank):
            torch.add(theta_0[columns], tau.sum(0), alpha=scale, out=out[columns])
        return out

    def _thinned(self, bank: Bank) -> Iterator[tuple[slice, Tensor]]:
        """m_k tau_k in parts: (columns, (K, width))."""
        draws, cut = [Draws(self.seed, name) for name in bank.names], int(self._cut())
        for columns in pieces(bank):
            tau = bank.taus(columns)
            for row, draw in zip(tau, draws, strict=True):
                self._thin(row, draw, cut)
            yield columns, tau

    def _cut(self) -> Tensor:
        return cut_at(torch.tensor(self.drop, dtype=torch.float64))

    def _least(self, name: str, tau: Tensor) -> Tensor:
        draw, cut = Draws(self.seed, name), int(self._cut())
        for part in torch.split(tau, block(tau, 2)):
            self._thin(part, draw, cut)
        return threshold(tau, self.keep)

    def _thin(self, tau: Tensor, draw: Draws, cut: int) -> None:
        m = draw.take(len(tau)).to(tau.device).ge_(cut)  # 1 and 0 as numbers: faster than masks
        tau.mul_(m.to(tau))


WHOLE = 2**16
"""As many values has a draw."""


class Draws:
    """The random numbers that decide which of an expert's parameters are dropped: one for each, in the order of columns.

    Integers from -2^15 to 2^15 - 1, four of one number of a Mersenne twister: on a CPU that takes a tenth of the time of real
    numbers in [0, 1). Nobody else draws from its generator.

    Parameters
    ----------
    seed : int
        Of the method.
    name : str
        The expert's.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.dare import Draws
    >>> first, again, other = (Draws(0, name).take(3) for name in ("axial", "axial", "coronal"))
    >>> torch.equal(first, again), torch.equal(first, other)
    (True, False)
    """

    def __init__(self, seed: int, name: str) -> None:
        self._generator = torch.Generator().manual_seed(random.Random(f"dare {seed} {name}").getrandbits(63))
        self._left = torch.empty(0, dtype=torch.int16)

    def take(self, count: int) -> Tensor:
        """The next ones (count,), int16: in parts they are the same as in one piece."""
        before = self._left
        fours = torch.empty(-(-max(0, count - len(before)) // 4), dtype=torch.int64)
        drawn = fours.random_(-(2**63), None, generator=self._generator).view(torch.int16)
        found = torch.cat([before, drawn]) if len(before) else drawn
        self._left = found[count:].clone()
        return found[:count]


def cut_at(p: Tensor) -> Tensor:
    """From which draw on an entry stays that is dropped with probability p, to the nearest 2^-16.

    Parameters
    ----------
    p : Tensor
        (...), float64, in [0, 1).

    Returns
    -------
    Tensor
        (...), int16, from -2^15, where all stay, to 2^15 - 1.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.dare import cut_at
    >>> cut_at(torch.tensor([0.0, 0.5, 0.75]))
    tensor([-32768,      0,  16384], dtype=torch.int16)
    """
    return ((p * WHOLE).round().clamp(max=WHOLE - 1) - WHOLE // 2).to(torch.int16)


def rescaling(cut: Tensor) -> Tensor:
    """1 / (1 - p): by what an entry that stays is multiplied, so that its expectation stays.

    Parameters
    ----------
    cut : Tensor
        (...), as `cut_at` returns it.

    Returns
    -------
    Tensor
        (...), float64, from 1 to 2^16.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.dare import cut_at, rescaling
    >>> rescaling(cut_at(torch.tensor([0.0, 0.5, 0.75])))
    tensor([1., 2., 4.], dtype=torch.float64)
    """
    return WHOLE / (WHOLE // 2 - cut.double())
