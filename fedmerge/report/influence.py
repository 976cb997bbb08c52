"""How an adaptive method spreads its trust: the coefficients of a run in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Influence:
    """Over the stream's batches. mean: (K,), each expert's coefficient. strongest: (K,), in what share of batches it is largest.

    effective: mean over batches of exp(H(alpha)), between 1 (one expert alone) and K (all alike).
    """

    mean: tuple[float, ...]
    strongest: tuple[float, ...]
    effective: float


def influence(coefficients: NDArray[np.float64]) -> Influence:
    """Of coefficients (T, K); negative ones, which extrapolation makes, count as none in the effective number."""
    share = np.clip(coefficients, 0, None)
    share = share / np.maximum(share.sum(1, keepdims=True), np.finfo(float).tiny)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1)
    largest = np.bincount(coefficients.argmax(1), minlength=coefficients.shape[1]) / len(coefficients)
    return Influence(tuple(coefficients.mean(0).tolist()), tuple(largest.tolist()), float(np.exp(entropy).mean()))
