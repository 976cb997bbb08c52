"""May entropy be trusted here? How well the experts' entropies tell who is right, on the predictions that a run has kept."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.errors import FolderError
from fedmerge.report.metrics.classification import SMALLEST
from fedmerge.report.metrics.decisions import FINISHED, kept_arrays, share_of
from fedmerge.system.files import reading

Float = NDArray[np.float64]
PREFIX = "p:expert:"
SPLITS = {(True, True): "both right", (True, False): "one right", (False, True): "one right", (False, False): "both wrong"}


@dataclass(frozen=True)
class Trust:
    """Entropy ratios against cross-entropy ratios of a pair of experts, over some samples.

    pearson, spearman: in [-1, 1], or None where a ratio never changes. sides: share of samples in which the expert of lower entropy
    has the lower cross-entropy too, which is all that a choice by entropy needs.
    """

    pair: tuple[str, str]
    split: str
    samples: int
    pearson: float | None
    spearman: float | None
    sides: float | None


def trust(p: dict[str, NDArray[np.float32]], y: NDArray[np.int64]) -> list[Trust]:
    """For every pair of experts, over all samples and by who is right. p: name -> (samples, C); y: (samples,).

    Ratios H_i / (H_i + H_j) and l_i / (l_i + l_j), l the cross-entropy (Oh et al., DaWin, ICLR 2025, figure 2). Exchanging i and j
    mirrors both, so unordered pairs are enough.
    """
    found: list[Trust] = []
    for pair, (a, b, splits) in ratios(p, y).items():
        found.append(_measured(pair, "all", a, b))
        found += [_measured(pair, split, a[splits == split], b[splits == split]) for split in dict.fromkeys(SPLITS.values())]
    return found


def ratios(p: dict[str, NDArray[np.float32]], y: NDArray[np.int64]) -> dict[tuple[str, str], tuple[Float, Float, NDArray[np.str_]]]:
    """For every pair: entropy ratios and cross-entropy ratios in [0, 1], and who is right, each (samples,)."""
    H = {name: -(q * np.log(q)).sum(1) for name, q in _clipped(p).items()}
    loss = {name: -np.log(q[np.arange(len(y)), y]) for name, q in _clipped(p).items()}
    right = {name: q.argmax(1) == y for name, q in p.items()}
    found = {}
    for i, j in combinations(p, 2):
        splits = np.array([SPLITS[bool(u), bool(v)] for u, v in zip(right[i], right[j], strict=True)])
        found[i, j] = (share_of(H[i], H[j]), share_of(loss[i], loss[j]), splits)
    return found


def how_many_right(p: dict[str, NDArray[np.float32]], y: NDArray[np.int64]) -> list[int]:
    """Samples with 0, 1, .., K right experts: where none is right no choice among them helps, where all are no choice is needed."""
    right = np.stack([q.argmax(1) == y for q in p.values()]).sum(0)
    return [int(count) for count in np.bincount(right, minlength=len(p) + 1)]


def kept_predictions(run: Path) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.int64]]:
    """Every expert's predictions and the labels of a finished run, on the images that all of them saw.

    Raises FolderError if it has none, fewer than two experts, or no image that all experts saw.
    """
    with reading(run, "no predictions", FINISHED):
        stored = kept_arrays(run)
    p, y = {name.removeprefix(PREFIX): rows for name, rows in stored.items() if name.startswith(PREFIX)}, stored["labels"]
    if len(p) < 2:
        found = f"those of one expert, {next(iter(p))}" if p else "none of an expert"
        mend = "add {expert: {with_theta_0: true}} to the methods: theta_0 is the second" if p else "add 'expert' to the methods"
        raise FolderError(f"{run}: among the predictions, found {found}; expected those of two experts or more: {mend}")
    seen = np.all(
        [np.isfinite(q).all(1) for q in p.values()], axis=0
    )  # where hospitals come and go, some images have no prediction
    if not seen.any():
        raise FolderError(
            f"{run}: found no image that all of {', '.join(p)} predicted; expected a batch at which all of them are there"
        )
    return {name: q[seen] for name, q in p.items()}, y[seen]


def as_rows(found: list[Trust]) -> list[dict[str, Any]]:
    """Plain records."""
    return [vars(one) | {"pair": list(one.pair)} for one in found]


def _measured(pair: tuple[str, str], split: str, a: Float, b: Float) -> Trust:
    from scipy.stats import pearsonr, spearmanr

    constant = len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0
    return Trust(
        pair,
        split,
        len(a),
        None if constant else float(pearsonr(a, b).statistic),
        None if constant else float(spearmanr(a, b).statistic),
        float(((a < 0.5) == (b < 0.5)).mean()) if len(a) else None,
    )


def _clipped(p: dict[str, NDArray[np.float32]]) -> dict[str, Float]:
    return {name: np.clip(q.astype(np.float64), SMALLEST, 1) for name, q in p.items()}
