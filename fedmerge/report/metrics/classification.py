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
    """accuracy: correct over all samples. batch_accuracy: mean of the batches' accuracies. nll in nats. ece: 15 bins.

    auroc: one class against the rest, macro; None where the stream has one class only. brier: in [0, 2].
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
    """Metrics of class probabilities (samples, C) against the labels of every batch.

    balanced_accuracy, macro_f1 and auroc are over the classes that occur in the stream.
    """
    from sklearn.metrics import f1_score, recall_score

    y = np.concatenate(labels)
    predicted = probabilities.argmax(-1)
    right = (predicted == y).astype(float)
    present = np.unique(y)
    edges = np.cumsum([0, *(len(batch) for batch in labels)])
    taken = np.clip(probabilities[np.arange(len(y)), y].astype(np.float64), SMALLEST, 1)
    return Metrics(
        accuracy=float(right.mean()),
        batch_accuracy=float(np.mean([right[a:b].mean() for a, b in pairwise(edges)])),
        balanced_accuracy=float(recall_score(y, predicted, labels=present, average="macro", zero_division=0)),
        macro_f1=float(f1_score(y, predicted, labels=present, average="macro", zero_division=0)),
        auroc=auroc(probabilities, y),
        nll=float(-np.log(taken).mean()),
        ece=calibration_error(probabilities, y),
        brier=brier(probabilities, y),
    )


def calibration_error(probabilities: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    """Expected calibration error with 15 equal bins and the l1 norm (Naeini et al., AAAI 2015).

    That of torchmetrics, to the last bit, whose import takes as long as a small run: it brings transformers with it.
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
    """Mean over the classes that occur of the area under the ROC curve of that class against the rest; None with one class."""
    from sklearn.metrics import roc_auc_score

    present = np.unique(y)
    if len(present) < 2:
        return None
    return float(np.mean([roc_auc_score(y == label, probabilities[:, label]) for label in present]))


def brier(probabilities: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    """Mean over samples of sum_c (p_c - [y = c])^2, in [0, 2] (Brier, Monthly Weather Review 1950)."""
    p = probabilities.astype(np.float64)
    return float(((p - np.eye(p.shape[1])[y]) ** 2).sum(1).mean())


def by_group(probabilities: NDArray[np.float32], y: NDArray[np.int64], groups: NDArray[np.int64]) -> dict[int, float]:
    """Accuracy within each group (domain or class) that occurs."""
    right = probabilities.argmax(-1) == y
    return {int(group): float(right[groups == group].mean()) for group in np.unique(groups)}


def err(accuracy: float, base: float) -> float | None:
    """Err = 100 (1 - acc) / (1 - acc_base); None where the base makes no error (Imam et al., T^3, 2025, appendix D.2)."""
    return None if base >= 1 else 100 * (1 - accuracy) / (1 - base)


def mce_t3(errs: Sequence[float | None]) -> float | None:
    """Mean of Err over conditions, those without a value left out (T^3's mCE; in-domain is no condition). None if none is left."""
    known = [value for value in errs if value is not None]
    return sum(known) / len(known) if known else None


def mce_in(errors: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]]) -> float | None:
    """mean_c sum_s E_sc / sum_s E_sc^base, in percent (Hendrycks & Dietterich, ICLR 2019, eq. 1).

    errors, base: corruption -> error in [0, 1] at every severity. Corruptions without a base error are left out.
    """
    ratios = [100 * sum(errors[name]) / sum(base[name]) for name in errors if sum(base[name]) > 0]
    return sum(ratios) / len(ratios) if ratios else None


def gap_closed(accuracy: float, mean: float, oracle: float) -> float | None:
    """Share of the gap between the mean merge and the oracle that a method closes; None where there is no gap."""
    return None if oracle <= mean else (accuracy - mean) / (oracle - mean)
