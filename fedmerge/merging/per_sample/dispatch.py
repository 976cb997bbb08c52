"""Predictions where samples of a batch have coefficients of their own, by the cheapest of three exact ways.

mixture: one pass with mixed parameters (merge/mixture.py). rows: one merge and one forward for each distinct row of coefficients.
samples: one merge and one forward for each sample. They agree to rounding; `auto` measures once and then takes the cheapest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedmerge.errors import PerSampleRefused
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.per_sample.mixture import Mixture

Way = Literal["auto", "mixture", "rows", "samples"]


@dataclass(frozen=True)
class PerSampleLogits:
    """Logits (N, C), how they were found, and what it took: forwards of a batch through one model, and merges."""

    logits: Tensor
    way: str
    forwards: int
    merges: int


@dataclass
class Costs:
    """Seconds, measured once on a batch of `size`: one merge, a forward of one sample, of the batch, and of the mixture."""

    size: int = 0
    merge: float = 0.0
    one: float = 0.0
    batch: float = 0.0
    mixture: float = float("inf")

    def cheapest(self, samples: int, distinct: int) -> str:
        """The way of least expected time for a batch of `samples` with so many distinct rows."""
        slope = max(0.0, self.batch - self.one) / max(1, self.size - 1)  # a forward of n samples costs one + (n - 1) slope
        rows = distinct * (self.merge + self.one - slope) + samples * slope
        return "mixture" if self.mixture * samples / max(1, self.size) < rows else "rows"


@dataclass
class PerSample:
    """One bank's way with coefficient rows. taken: batches by way. refusal: why the mixture cannot be used, or nothing."""

    bank: Bank
    way: Way = "auto"
    costs: Costs = field(default_factory=Costs)
    taken: dict[str, int] = field(default_factory=dict)
    refusal: str = ""
    _checked: bool = False

    def predict(self, batch: Tensor, coefficients: Coefficients) -> PerSampleLogits:
        """Logits of a batch (N, channels, H, W) under coefficients (N, K) or (N, K + A).

        Raises PerSampleRefused if the mixture is asked for and the model cannot be run so.
        """
        both = torch.cat([coefficients.encoder, coefficients.head], 1)
        distinct, which = torch.unique(both, dim=0, return_inverse=True)
        if len(distinct) == 1:
            way = "rows"
        elif self.way == "auto":
            way = self._cheapest(batch, coefficients, len(distinct))
        else:
            way = self.way
        if way == "mixture":
            self._check(batch, coefficients)
        self.taken[way] = self.taken.get(way, 0) + 1
        if way == "mixture":
            used = int(coefficients.encoder.any(0).sum())
            return PerSampleLogits(Mixture(self.bank).forward(batch, coefficients.encoder, coefficients.head), way, used, 0)
        if way == "samples":
            distinct, which = both, torch.arange(len(both))
        return PerSampleLogits(self._by_groups(batch, distinct, which), way, 1, len(distinct))

    def _by_groups(self, batch: Tensor, rows: Tensor, which: Tensor) -> Tensor:
        width, logits = rows.shape[1] // 2, None
        for number, row in enumerate(rows):
            here = (which == number).to(batch.device)
            theta = self.bank.mix(row[:width], row[width:])
            part = self.bank.forward(theta, batch[here], row[:width])
            logits = part.new_empty(len(batch), part.shape[1]) if logits is None else logits
            logits[here] = part
        assert logits is not None
        return logits

    def _check(self, batch: Tensor, coefficients: Coefficients) -> None:
        """Once: the mixture must agree with explicit merges, on real samples."""
        if not self._checked:
            Mixture(self.bank).verify(batch, coefficients.encoder, coefficients.head)
            self._checked = True

    def _cheapest(self, batch: Tensor, coefficients: Coefficients, distinct: int) -> str:
        if self.costs.size == 0:
            self._measure(batch, coefficients)
        return self.costs.cheapest(len(batch), distinct)

    def _measure(self, batch: Tensor, coefficients: Coefficients) -> None:
        encoder, head = coefficients.encoder, coefficients.head
        theta = self.bank.blank()
        self.costs = Costs(
            size=len(batch),
            merge=_seconds(lambda: self.bank.mix(encoder[0], head[0], theta)),
            one=_seconds(lambda: self.bank.forward(theta, batch[:1], encoder[0])),
            batch=_seconds(lambda: self.bank.forward(theta, batch, encoder[0])),
        )
        try:
            self._check(batch, coefficients)
            self.costs.mixture = _seconds(lambda: Mixture(self.bank).forward(batch, encoder, head))
        except PerSampleRefused as refusal:
            self.refusal = str(refusal)


def _seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The least of a few times, after one that warms up; waits for a GPU to finish."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
