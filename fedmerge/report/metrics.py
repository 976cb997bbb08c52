"""Metrics of one method over the whole stream."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

SMALLEST = 1e-12
"""Probabilities are clipped here before their logarithm, so that one sure mistake costs 27.6 nats and not infinity."""

BINS = 15


@dataclass(frozen=True)
class Metrics:
    """accuracy: correct over all samples. batch_accuracy: mean of the batches' accuracies. nll in nats. ece: 15 bins."""

    accuracy: float
    batch_accuracy: float
    balanced_accuracy: float
    macro_f1: float
    nll: float
    ece: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers by name."""
        return asdict(self)


def measure(probabilities: NDArray[np.float32], labels: list[NDArray[np.int64]]) -> Metrics:
    """Metrics of class probabilities (samples, C) against the labels of every batch.

    balanced_accuracy and macro_f1 are over the classes that occur in the stream.
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
        nll=float(-np.log(taken).mean()),
        ece=calibration_error(probabilities, y),
    )


def calibration_error(probabilities: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    """Expected calibration error with 15 equal bins and the l1 norm (Naeini et al., AAAI 2015)."""
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    p = torch.from_numpy(probabilities)
    return float(multiclass_calibration_error(p, torch.from_numpy(y), p.shape[1], n_bins=BINS, norm="l1"))


def by_group(probabilities: NDArray[np.float32], y: NDArray[np.int64], groups: NDArray[np.int64]) -> dict[int, float]:
    """Accuracy within each group (domain or class) that occurs."""
    right = probabilities.argmax(-1) == y
    return {int(group): float(right[groups == group].mean()) for group in np.unique(groups)}
