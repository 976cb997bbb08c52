"""How sure the numbers are: intervals over the batches of one stream, and paired comparison of two methods on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Accuracy of a method less that of the reference on the same samples; ci95 by block bootstrap, p by McNemar."""

    difference: float
    ci95: tuple[float, float]
    p: float


def block_length(batches: int) -> int:
    """Length of a block in batches: T^(1/3), the usual order (Kuensch 1989), since neighboring batches are alike."""
    return max(1, int(np.rint(np.cbrt(batches))))


def interval(correct: NDArray[np.int64], sizes: NDArray[np.int64], seed: int) -> tuple[float, float]:
    """95% interval of the stream's accuracy. correct, sizes: (T,), right predictions and samples of every batch."""
    right, seen = _sums((correct, sizes), seed)
    return _quantiles(right / seen)


def paired(right: NDArray[np.bool_], reference: NDArray[np.bool_], sizes: NDArray[np.int64], seed: int) -> Difference:
    """Compare two methods on the same samples. right, reference: (samples,); sizes: (T,)."""
    edges = np.cumsum(sizes)[:-1]
    gains = np.array([part.sum() for part in np.split(right.astype(np.int64) - reference.astype(np.int64), edges)])
    gained, seen = _sums((gains, sizes), seed)
    return Difference(
        difference=float(right.mean() - reference.mean()),
        ci95=_quantiles(gained / seen),
        p=mcnemar(int((right & ~reference).sum()), int((~right & reference).sum())),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test on the samples where exactly one of two methods is right (McNemar 1947).

    It takes samples as independent, which the neighbors in a stream are not: the interval beside it does not.
    """
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return 1.0 if discordant == 0 else float(binomtest(only_first, discordant, 0.5).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are, in the given order (Holm, Scandinavian Journal of Statistics 1979).

    The i-th smallest of m is multiplied by m - i + 1; none is smaller than one before it, and none is above 1.
    """
    order = np.argsort(ps, kind="stable")
    factors = len(ps) - np.arange(len(ps))
    raised = np.minimum(1, np.maximum.accumulate(np.asarray(ps, float)[order] * factors))
    adjusted = np.empty(len(ps))
    adjusted[order] = raised
    return [float(p) for p in adjusted]


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of several values; None of one."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def over_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    """95% t interval of the mean over seeds; None with one seed, which says nothing about others."""
    from scipy.stats import t

    error = standard_error(values)
    if error is None:
        return None
    center = float(np.mean(values))
    reach = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return center - reach, center + reach


def _sums(values: Sequence[NDArray[np.int64]], seed: int) -> list[NDArray[np.int64]]:
    """Sums of each of `values` (T,) over a circular block bootstrap (Politis & Romano 1992), (DRAWS,), on the same draws.

    The draws are the same for every method of a run. Blocks are summed as differences of running sums, so that memory grows with
    the number of blocks and not with DRAWS times T.
    """
    batches = len(values[0])
    length = block_length(batches)
    rng = np.random.Generator(np.random.PCG64(seed))
    starts = rng.integers(batches, size=(DRAWS, -(-batches // length)))
    stops = starts + length
    stops[:, -1] -= starts.shape[1] * length - batches  # the last block ends where there are as many batches as there were
    running = [np.concatenate([[0], np.tile(of, 2).cumsum()]) for of in values]
    return [(of[stops] - of[starts]).sum(1) for of in running]


def _quantiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
