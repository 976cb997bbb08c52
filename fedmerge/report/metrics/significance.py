"""How sure the numbers are: intervals over the patients or the batches of one stream, and paired comparison of two methods on it.

Images of one patient are alike, and so are neighbors in a stream. Where patients are known, whole patients are drawn; otherwise
blocks of batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95
AT_ONCE = 2**22
"""Units that are drawn at a time, which bounds the memory."""


@dataclass(frozen=True)
class Difference:
    """Accuracy of a method less that of the reference on the same samples; ci95 by bootstrap, p by McNemar."""

    difference: float
    ci95: tuple[float, float]
    p: float


def block_length(batches: int) -> int:
    """Length of a block in batches: T^(1/3), the usual order (Kuensch 1989), since neighboring batches are alike."""
    return max(1, int(np.rint(np.cbrt(batches))))


def interval(correct: NDArray[np.int64], sizes: NDArray[np.int64], seed: int, length: int | None = None) -> tuple[float, float]:
    """95% interval of the stream's accuracy. correct, sizes: (T,), right predictions and samples of every batch, or patient.

    length: of the blocks that are drawn together; 1 for patients, whose order means nothing. Default: `block_length`.
    """
    right, seen = _sums((correct, sizes), seed, length)
    return _quantiles(right / seen)


def paired(
    right: NDArray[np.bool_], reference: NDArray[np.bool_], units: NDArray[np.int64], seed: int, length: int | None = None
) -> Difference:
    """Compare two methods on the same samples. right, reference: (samples,); units: (samples,), the batch or patient of each.

    length: as for `interval`.
    """
    gains, sizes = per_unit(right.astype(np.int64) - reference.astype(np.int64), units)
    gained, seen = _sums((gains, sizes), seed, length)
    return Difference(
        difference=float(right.mean() - reference.mean()),
        ci95=_quantiles(gained / seen),
        p=mcnemar(int((right & ~reference).sum()), int((~right & reference).sum())),
    )


def per_unit(values: NDArray[np.int64], units: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sum of `values` (samples,), and number of samples, of each batch or patient that there is, in the order of its number."""
    member = np.unique(units, return_inverse=True)[1]
    sums = np.bincount(member, values)
    return np.rint(sums).astype(np.int64), np.bincount(member)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test on the samples where exactly one of two methods is right (McNemar 1947).

    It takes samples as independent, which neighbors in a stream and images of a patient are not: the interval beside it does not.
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


def _sums(values: Sequence[NDArray[np.int64]], seed: int, length: int | None = None) -> list[NDArray[np.int64]]:
    """Sums of each of `values` (T,) over a circular block bootstrap (Politis & Romano 1992), (DRAWS,), on the same draws.

    Of blocks of one it is the cluster bootstrap (Field & Welsh 2007). The draws are the same for every method of a run. Longer
    blocks are summed as differences of running sums, so that memory grows with the number of blocks and not with DRAWS times T.
    """
    batches = len(values[0])
    length = block_length(batches) if length is None else length
    rng = np.random.Generator(np.random.PCG64(seed))
    if length == 1:
        part, sums = max(1, AT_ONCE // batches), list[list[NDArray[np.int64]]]()
        for begun in range(0, DRAWS, part):
            rows = rng.integers(batches, size=(min(part, DRAWS - begun), batches))
            sums.append([of[rows].sum(1) for of in values])
        return [np.concatenate(of) for of in zip(*sums, strict=True)]
    starts = rng.integers(batches, size=(DRAWS, -(-batches // length)))
    stops = starts + length
    stops[:, -1] -= starts.shape[1] * length - batches  # the last block ends where there are as many batches as there were
    running = [np.concatenate([[0], np.tile(of, 2).cumsum()]) for of in values]
    return [(of[stops] - of[starts]).sum(1) for of in running]


def _quantiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
