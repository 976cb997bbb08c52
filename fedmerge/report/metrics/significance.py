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
    """Accuracy of a method less that of the reference on the same samples.

    Attributes
    ----------
    difference : float
        In [-1, 1].
    ci95 : tuple[float, float]
        Its 95% interval, by bootstrap.
    p : float
        By McNemar's test.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.significance import paired
    >>> right = np.arange(40) % 4 > 0  # three of four, and the other method is right on the fourth
    >>> found = paired(right, ~right, units=np.arange(40) // 4, seed=0)
    >>> round(found.difference, 2), found.ci95[0] > 0, found.p < 0.01
    (0.5, True, True)
    """

    difference: float
    ci95: tuple[float, float]
    p: float


def block_length(batches: int) -> int:
    """Length of a block in batches: T^(1/3), the usual order (Kuensch 1989), since neighboring batches are alike.

    Parameters
    ----------
    batches : int
        T.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> from fedmerge.report.metrics.significance import block_length
    >>> block_length(64)
    4
    """
    return max(1, int(np.rint(np.cbrt(batches))))


def interval(correct: NDArray[np.int64], sizes: NDArray[np.int64], seed: int, length: int | None = None) -> tuple[float, float]:
    """95% interval of the stream's accuracy.

    Parameters
    ----------
    correct : NDArray[np.int64]
        (T,), right predictions of every batch, or patient.
    sizes : NDArray[np.int64]
        (T,), samples of every batch, or patient.
    seed : int
        Of the draws.
    length : int | None, optional
        Of the blocks that are drawn together; 1 for patients, whose order means nothing. Default: `block_length`.

    Returns
    -------
    tuple[float, float]
        Both ends, in [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.significance import interval
    >>> low, high = interval(correct=np.array([6, 7, 8, 7]), sizes=np.array([8, 8, 8, 8]), seed=0)
    >>> low < 28 / 32 < high
    True
    """
    right, seen = _sums((correct, sizes), seed, length)
    return _quantiles(right / seen)


def paired(
    right: NDArray[np.bool_], reference: NDArray[np.bool_], units: NDArray[np.int64], seed: int, length: int | None = None
) -> Difference:
    """Compare two methods on the same samples.

    Parameters
    ----------
    right : NDArray[np.bool_]
        (samples,), whether the method is right.
    reference : NDArray[np.bool_]
        (samples,), whether the other is.
    units : NDArray[np.int64]
        (samples,), the batch or patient of each.
    seed : int
        Of the draws.
    length : int | None, optional
        As of `interval`.

    Returns
    -------
    Difference
        With its interval, and McNemar's p.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.significance import paired
    >>> one, other = np.array([True] * 36 + [False] * 4), np.array([True] * 24 + [False] * 16)
    >>> found = paired(one, other, units=np.arange(40), seed=0, length=1)  # every image is a patient of its own
    >>> round(found.difference, 2), found.p < 0.01
    (0.3, True)
    """
    gains, sizes = per_unit(right.astype(np.int64) - reference.astype(np.int64), units)
    gained, seen = _sums((gains, sizes), seed, length)
    return Difference(
        difference=float(right.mean() - reference.mean()),
        ci95=_quantiles(gained / seen),
        p=mcnemar(int((right & ~reference).sum()), int((~right & reference).sum())),
    )


def per_unit(values: NDArray[np.int64], units: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sum over the samples of each batch or patient, and how many these are, in the order of its number.

    Parameters
    ----------
    values : NDArray[np.int64]
        (samples,).
    units : NDArray[np.int64]
        (samples,), the batch or patient of each.

    Returns
    -------
    tuple[NDArray[np.int64], NDArray[np.int64]]
        Sums, and numbers of samples, one for each unit that there is.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.significance import per_unit
    >>> sums, samples = per_unit(np.array([1, 0, 1, 1]), units=np.array([7, 7, 9, 9]))
    >>> sums.tolist(), samples.tolist()
    ([1, 2], [2, 2])
    """
    member = np.unique(units, return_inverse=True)[1]
    sums = np.bincount(member, values)
    return np.rint(sums).astype(np.int64), np.bincount(member)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test on the samples where exactly one of two methods is right.

    It takes samples as independent, which neighbors in a stream and images of a patient are not: the interval beside it does not.

    Parameters
    ----------
    only_first : int
        Samples on which only the first is right.
    only_second : int
        Samples on which only the second is right.

    Returns
    -------
    float
        p, in [0, 1].

    References
    ----------
    McNemar, Note on the sampling error of the difference between correlated proportions, 1947.

    Examples
    --------
    >>> from fedmerge.report.metrics.significance import mcnemar
    >>> round(mcnemar(only_first=9, only_second=1), 4)
    0.0215
    """
    from scipy.special import betainc  # scipy.stats takes longer to import than all pages of a run to write

    low, high = sorted((only_first, only_second))
    return 1.0 if high - low <= 1 else float(2 * betainc(high, low + 1, 0.5))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are, in the given order.

    The i-th smallest of m is multiplied by m - i + 1; none is smaller than one before it, and none is above 1.

    Parameters
    ----------
    ps : Sequence[float]
        p-values.

    Returns
    -------
    list[float]
        Adjusted ones.

    References
    ----------
    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 1979.

    Examples
    --------
    >>> from fedmerge.report.metrics.significance import holm
    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(ps, kind="stable")
    factors = len(ps) - np.arange(len(ps))
    raised = np.minimum(1, np.maximum.accumulate(np.asarray(ps, float)[order] * factors))
    adjusted = np.empty(len(ps))
    adjusted[order] = raised
    return [float(p) for p in adjusted]


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of several values.

    Parameters
    ----------
    values : Sequence[float]
        At least one.

    Returns
    -------
    float | None
        In the unit of the values; None of one value.

    Examples
    --------
    >>> from fedmerge.report.metrics.significance import standard_error
    >>> round(standard_error([0.8, 0.9]), 3), standard_error([0.8])
    (0.05, None)
    """
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def over_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    """95% t interval of the mean over seeds.

    Parameters
    ----------
    values : Sequence[float]
        One for each seed.

    Returns
    -------
    tuple[float, float] | None
        Both ends; None with one seed, which says nothing about others.

    Examples
    --------
    >>> from fedmerge.report.metrics.significance import over_seeds
    >>> [round(end, 3) for end in over_seeds([0.8, 0.82, 0.84])]
    [0.77, 0.87]
    """
    from scipy.special import stdtrit

    error = standard_error(values)
    if error is None:
        return None
    center = float(np.mean(values))
    reach = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * error
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
