"""How a method fares after the stream has changed: accuracy of every segment, and how long it takes to recover."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MOST = 1000
"""Segments of a stream; one that changes more often has none that would say anything."""

WITHIN = 0.01
"""A method has recovered when a batch is within one point of its segment's accuracy."""


@dataclass(frozen=True)
class Segment:
    """Batches start..stop - 1, in which one domain has the largest share.

    Attributes
    ----------
    domain : int
        The domain.
    start : int
        The first batch.
    stop : int
        The batch after the last.
    accuracy : float
        Over the segment's samples.
    recovery : int
        Batches until the first that is as good as usual; in the first segment, how long the method takes to begin.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.segments import segments
    >>> truth = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> first, second = segments(truth, correct=np.array([8, 8, 2, 8]), sizes=np.array([8, 8, 8, 8]))
    >>> second.accuracy, second.recovery  # one batch until it is itself again
    (0.625, 1)
    """

    domain: int
    start: int
    stop: int
    accuracy: float
    recovery: int


def segments(truth: NDArray[np.float64], correct: NDArray[np.int64], sizes: NDArray[np.int64]) -> list[Segment]:
    """Runs of batches of one largest domain, the first of equals.

    Parameters
    ----------
    truth : NDArray[np.float64]
        (T, D), shares of domains.
    correct : NDArray[np.int64]
        (T,), right predictions of every batch.
    sizes : NDArray[np.int64]
        (T,), samples of every batch.

    Returns
    -------
    list[Segment]
        In order; none if there are more than `MOST`.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.segments import segments
    >>> truth = np.array([[1.0, 0.0], [0.8, 0.2], [0.3, 0.7]])
    >>> [(one.start, one.stop) for one in segments(truth, correct=np.array([8, 7, 6]), sizes=np.array([8, 8, 8]))]
    [(0, 2), (2, 3)]
    """
    largest = truth.argmax(1)
    edges = [0, *(np.flatnonzero(np.diff(largest)) + 1).tolist(), len(largest)]
    if len(edges) > MOST + 1:
        return []
    return [_segment(int(largest[a]), a, b, correct[a:b], sizes[a:b]) for a, b in pairwise(edges)]


def _segment(domain: int, start: int, stop: int, correct: NDArray[np.int64], sizes: NDArray[np.int64]) -> Segment:
    accuracy = float(correct.sum() / sizes.sum())
    good = np.flatnonzero(correct / sizes >= accuracy - WITHIN)  # never empty: some batch is no worse than the mean of all
    return Segment(domain, start, stop, accuracy, int(good[0]))


def halves(correct: NDArray[np.int64], sizes: NDArray[np.int64]) -> tuple[float, float] | None:
    """Accuracy of the first and of the second half of the batches. Late batches see depleted classes.

    Parameters
    ----------
    correct : NDArray[np.int64]
        (T,), right predictions of every batch.
    sizes : NDArray[np.int64]
        (T,), samples of every batch.

    Returns
    -------
    tuple[float, float] | None
        Both; None with one batch.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.segments import halves
    >>> halves(correct=np.array([8, 8, 4, 4]), sizes=np.array([8, 8, 8, 8]))
    (1.0, 0.5)
    """
    middle = len(sizes) // 2
    if middle == 0:
        return None
    first, second = slice(0, middle), slice(middle, None)
    return float(correct[first].sum() / sizes[first].sum()), float(correct[second].sum() / sizes[second].sum())
