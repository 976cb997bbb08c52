"""Metrics of one method over the whole stream.

Errors relative to another method's, as the papers have them, and how much of the way to the oracle a method goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

SMALLEST = 1e-12
"""Probabilities are clipped here before their logarithm, so that one sure mistake costs 27.6 nats and not infinity."""

BINS = 15


@dataclass(frozen=True)
class Metrics:
    """Metrics of one method over the whole stream.

    Attributes
    ----------
    accuracy : float
        Share of right predictions, over all samples.
    batch_accuracy : float
        Mean of the batches' accuracies.
    balanced_accuracy : float
        Mean of the recalls of the classes that occur.
    macro_f1 : float
        Mean of the F1 scores of the classes that occur.
    auroc : float | None
        Area under the ROC curve of one class against the rest, the mean over classes; None where the stream has one class only.
    nll : float
        Mean of -log p of the true class, nats.
    ece : float
        Expected calibration error, 15 bins, in [0, 1].
    brier : float
        Brier score, in [0, 2].

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.classification import measure
    >>> p, y = np.float32([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]), np.array([0, 0, 1, 1])
    >>> found = measure(p, [y[:2], y[2:]]).as_dict()
    >>> {name: round(value, 3) for name, value in found.items() if name in ("balanced_accuracy", "nll")}
    {'balanced_accuracy': 0.75, 'nll': 0.511}
    """

    accuracy: float
    batch_accuracy: float
    balanced_accuracy: float
    macro_f1: float
    auroc: float | None
    nll: float
    ece: float
    brier: float

    def as_dict(self) -> dict[str, float | None]:
        """Plain numbers by name."""
        return asdict(self)


def measure(probabilities: NDArray[np.float32], labels: list[NDArray[np.int64]]) -> Metrics:
    """Metrics of class probabilities against the labels of every batch.

    balanced_accuracy, macro_f1 and auroc are over the classes that occur in the stream.

    Parameters
    ----------
    probabilities : NDArray[np.float32]
        Class probabilities (samples, C).
    labels : list[NDArray[np.int64]]
        (n_t,) of each batch t, from 0.

    Returns
    -------
    Metrics
        All of them.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.classification import measure
    >>> p, y = np.float32([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]), np.array([0, 0, 1, 1])
    >>> found = measure(p, [y[:2], y[2:]])
    >>> found.accuracy, found.batch_accuracy, round(found.brier, 3)
    (0.75, 0.75, 0.35)
    """
    y = np.concatenate(labels)
    predicted = probabilities.argmax(-1)
    right = (predicted == y).astype(float)
    hits, true, found = (np.bincount(of, minlength=probabilities.shape[1]) for of in (y[right == 1], y, predicted))
    occurs = true > 0
    edges = np.cumsum([0, *(len(batch) for batch in labels)])
    taken = np.clip(probabilities[np.arange(len(y)), y].astype(np.float64), SMALLEST, 1)
    return Metrics(
        accuracy=float(right.mean()),
        batch_accuracy=float(np.mean([right[a:b].mean() for a, b in pairwise(edges)])),
        balanced_accuracy=float(np.mean(hits[occurs] / true[occurs])),
        macro_f1=float(np.mean(2.0 * hits[occurs] / (true + found)[occurs])),
        auroc=auroc(probabilities, y),
        nll=float(-np.log(taken).mean()),
        ece=calibration_error(probabilities, y),
        brier=brier(probabilities, y),
    )


def calibration_error(probabilities: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    """Expected calibration error with 15 equal bins and the l1 norm.

    That of torchmetrics, to the last bit, whose import takes as long as a small run: it brings transformers with it.

    Parameters
    ----------
    probabilities : NDArray[np.float32]
        Class probabilities (samples, C).
    y : NDArray[np.int64]
        Labels (samples,), from 0.

    Returns
    -------
    float
        In [0, 1].

    References
    ----------
    Naeini et al., Obtaining well calibrated probabilities using Bayesian binning, AAAI 2015.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.classification import calibration_error
    >>> p, y = np.float32([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]), np.array([0, 0, 1, 1])
    >>> round(calibration_error(p, y), 3)
    0.35
    """
    import torch

    confidence, guess = torch.from_numpy(probabilities).max(1)
    bins = torch.bucketize(confidence, torch.linspace(0, 1, BINS + 1), right=True) - 1  # the last one for those of exactly 1

    def summed(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(BINS + 1).scatter_add_(0, bins, values)

    count = summed(torch.ones_like(confidence))
    right, sure = summed((guess == torch.from_numpy(y)).float()) / count, summed(confidence) / count
    return float(((right - sure).nan_to_num().abs() * (count / count.sum())).sum())


def auroc(probabilities: NDArray[np.float32], y: NDArray[np.int64]) -> float | None:
    """Area under the ROC curve of a class against the rest, the mean over the classes that occur.

    Parameters
    ----------
    probabilities : NDArray[np.float32]
        Class probabilities (samples, C).
    y : NDArray[np.int64]
        Labels (samples,), from 0.

    Returns
    -------
    float | None
        In [0, 1]; None with one class.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.classification import auroc
    >>> p, y = np.float32([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]), np.array([0, 0, 1, 1])
    >>> auroc(p, y)
    0.75
    """
    present = np.unique(y)
    if len(present) < 2:
        return None
    return float(np.mean([_area(y == label, probabilities[:, label]) for label in present]))


def _area(true: NDArray[np.bool_], score: NDArray[np.float32]) -> float:
    """(U / n m) of Mann and Whitney: how often an image of the class is scored above one of another, ties half."""
    _, which, ties = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[which]
    n, m = int(true.sum()), int((~true).sum())
    return float((ranks[true].sum() - n * (n + 1) / 2) / (n * m))


def brier(probabilities: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    """Mean over samples of sum_c (p_c - [y = c])^2.

    Parameters
    ----------
    probabilities : NDArray[np.float32]
        Class probabilities (samples, C).
    y : NDArray[np.int64]
        Labels (samples,), from 0.

    Returns
    -------
    float
        In [0, 2].

    References
    ----------
    Brier, Verification of forecasts expressed in terms of probability, Monthly Weather Review 1950.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.classification import brier
    >>> p, y = np.float32([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]), np.array([0, 0, 1, 1])
    >>> round(brier(p, y), 3)
    0.35
    """
    p = probabilities.astype(np.float64)
    return float(((p - np.eye(p.shape[1])[y]) ** 2).sum(1).mean())


def by_group(probabilities: NDArray[np.float32], y: NDArray[np.int64], groups: NDArray[np.int64]) -> dict[int, float]:
    """Accuracy within each group (domain or class) that occurs.

    Parameters
    ----------
    probabilities : NDArray[np.float32]
        Class probabilities (samples, C).
    y : NDArray[np.int64]
        Labels (samples,), from 0.
    groups : NDArray[np.int64]
        Group of each sample (samples,).

    Returns
    -------
    dict[int, float]
        Group -> accuracy.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.classification import by_group
    >>> p, y = np.float32([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]), np.array([0, 0, 1, 1])
    >>> by_group(p, y, groups=y)  # recall of each class
    {0: 1.0, 1: 0.5}
    """
    right = probabilities.argmax(-1) == y
    return {int(group): float(right[groups == group].mean()) for group in np.unique(groups)}


def err(accuracy: float, base: float) -> float | None:
    """Err = 100 (1 - acc) / (1 - acc_base), the error as a percentage of another's.

    Parameters
    ----------
    accuracy : float
        Of the method, in [0, 1].
    base : float
        Of the other, in [0, 1].

    Returns
    -------
    float | None
        Percent; None where the base makes no error.

    References
    ----------
    Imam et al., T^3: Test-time model merging in VLMs, 2025, appendix D.2.

    Examples
    --------
    >>> from fedmerge.report.metrics.classification import err
    >>> round(err(accuracy=0.9, base=0.8), 1)  # half of the other's errors
    50.0
    """
    return None if base >= 1 else 100 * (1 - accuracy) / (1 - base)


def mce_t3(errs: Sequence[float | None]) -> float | None:
    """Mean of Err over conditions, those without a value left out: the mCE of T^3, to which in-domain is no condition.

    Parameters
    ----------
    errs : Sequence[float | None]
        `err` of each condition.

    Returns
    -------
    float | None
        Percent; None if no value is left.

    Examples
    --------
    >>> from fedmerge.report.metrics.classification import mce_t3
    >>> mce_t3([50.0, None, 100.0])
    75.0
    """
    known = [value for value in errs if value is not None]
    return sum(known) / len(known) if known else None


def mce_in(errors: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]]) -> float | None:
    """mean_c sum_s E_sc / sum_s E_sc^base, in percent.

    Parameters
    ----------
    errors : Mapping[str, Sequence[float]]
        Corruption -> error in [0, 1] at every severity.
    base : Mapping[str, Sequence[float]]
        The same of the method that others are compared with. Corruptions without an error of it are left out.

    Returns
    -------
    float | None
        Percent; None if no corruption is left.

    References
    ----------
    Hendrycks & Dietterich, Benchmarking neural network robustness, ICLR 2019, equation 1.

    Examples
    --------
    >>> from fedmerge.report.metrics.classification import mce_in
    >>> round(mce_in({"noise": [0.1, 0.3]}, {"noise": [0.2, 0.6]}), 1)
    50.0
    """
    ratios = [100 * sum(errors[name]) / sum(base[name]) for name in errors if sum(base[name]) > 0]
    return sum(ratios) / len(ratios) if ratios else None


def gap_closed(accuracy: float, mean: float, oracle: float) -> float | None:
    """Share of the gap between the mean merge and the oracle that a method closes.

    Parameters
    ----------
    accuracy : float
        Of the method, in [0, 1].
    mean : float
        Of the mean merge.
    oracle : float
        Of the oracle.

    Returns
    -------
    float | None
        1 as good as the oracle, 0 as good as the mean; None where there is no gap.

    Examples
    --------
    >>> from fedmerge.report.metrics.classification import gap_closed
    >>> round(gap_closed(accuracy=0.85, mean=0.8, oracle=0.9), 2)
    0.5
    """
    return None if oracle <= mean else (accuracy - mean) / (oracle - mean)
