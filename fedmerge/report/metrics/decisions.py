"""What a choice between models had to go by: how sure they were and how far apart, image by image, and which of them was right."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.report.metrics.classification import SMALLEST
from fedmerge.system.files import reading

Float = NDArray[np.float64]
WHO = ((True, True), (True, False), (False, True), (False, False))
MOST_SETTINGS = 12
"""Settings that a plot can tell apart."""

FINISHED = "expected a finished run, e.g. runs/organs-0"


@dataclass(frozen=True)
class Signals:
    """Of a pair of models, each (samples,). right: (samples, 3), of the first, the second and the mean of their probabilities.

    share: of the first in their e^-H, which is DaWin's coefficient (Oh et al., Eq. 1). apart: Jensen-Shannon divergence over ln 2,
    T^3's mutual information (Imam et al., 2025), in [0, 1]. unsure: mean entropy over ln C. entropy, loss: of the first, as shares
    of the sum of both. stake: how far apart the two cross-entropies are. agree: both say one class.
    """

    pair: tuple[str, str]
    share: Float
    apart: Float
    unsure: Float
    entropy: Float
    loss: Float
    stake: Float
    right: NDArray[np.bool_]
    agree: NDArray[np.bool_]


def signals(p: dict[str, NDArray[np.float32]], y: NDArray[np.int64]) -> list[Signals]:
    """For every pair of models. p: name -> (samples, C); y: (samples,)."""
    q = {name: np.clip(rows.astype(np.float64), SMALLEST, 1) for name, rows in p.items()}
    at = np.arange(len(y))
    found = []
    for i, j in combinations(q, 2):
        a, b = q[i], q[j]
        mean = (a + b) / 2
        H, other, whole = (_entropy(rows) for rows in (a, b, mean))
        loss, own = -np.log(a[at, y]), -np.log(b[at, y])
        found.append(
            Signals(
                pair=(i, j),
                share=1 / (1 + np.exp(H - other)),
                apart=np.clip((whole - (H + other) / 2) / math.log(2), 0, 1),
                unsure=(H + other) / 2 / math.log(a.shape[1]),
                entropy=share_of(H, other),
                loss=share_of(loss, own),
                stake=np.abs(loss - own),
                right=np.stack([rows.argmax(1) == y for rows in (a, b, mean)], 1),
                agree=a.argmax(1) == b.argmax(1),
            )
        )
    return found


def by_who(one: Signals) -> list[dict[str, Any]]:
    """TrueTrue, TrueFalse, FalseTrue, FalseFalse: what signals say where the first is right or not, and the second.

    entropy_loss: Pearson of the entropy ratio with the cross-entropy ratio. apart_stake: of the divergence with the difference of
    the two cross-entropies, which is what a choice between them is about. None where one of the two never changes.
    """
    rows = []
    for first, second in WHO:
        here = (one.right[:, 0] == first) & (one.right[:, 1] == second)
        rows.append(
            {
                "pair": list(one.pair),
                "who": f"{first}{second}",
                "samples": int(here.sum()),
                "entropy_loss": _pearson(one.entropy[here], one.loss[here]),
                "apart_stake": _pearson(one.apart[here], one.stake[here]),
                "share": _mean(one.share[here]),
                "apart": _mean(one.apart[here]),
            }
        )
    return rows


def quadrants(one: Signals) -> list[dict[str, Any]]:
    """How many images, and who is right there: the models say one class or two, and are surer than in half of all images or not."""
    sure = one.unsure <= np.median(one.unsure)
    rows = []
    for agree in (True, False):
        for surer in (True, False):
            here = (one.agree == agree) & (sure == surer)
            first, second, both = (_mean(one.right[here, column]) for column in range(3))
            rows.append(
                {"pair": list(one.pair), "agree": agree, "sure": surer, "samples": int(here.sum())}
                | {"first": first, "second": second, "average": both}
            )
    return rows


def entropies(rows: dict[str, NDArray[np.float32]], y: NDArray[np.int64], single: frozenset[str]) -> list[dict[str, Any]]:
    """Mean entropy of every row's predictions, nats, also where it is right and where it is wrong; the surest first.

    single: rows of models that nothing is merged into (Oh et al., DaWin, figure 6). Images without a prediction do not count.
    """
    found = []
    for name, whole in rows.items():
        there = np.isfinite(whole).all(1)
        if not there.any():
            continue
        q = np.clip(whole[there].astype(np.float64), SMALLEST, 1)
        H, right = _entropy(q), q.argmax(1) == y[there]
        found.append(
            {"row": name, "single": name in single, "accuracy": _mean(right), "entropy": _mean(H)}
            | {"right": _mean(H[right]), "wrong": _mean(H[~right])}
        )
    return sorted(found, key=lambda row: row["entropy"])


def kept_arrays(run: Path) -> dict[str, NDArray[Any]]:
    """A run's `predictions.npz`: labels and other facts (samples,) by name, and rows of predictions (samples, C) below `p:`.

    Raises ValueError, KeyError or OSError for a file that cannot be read, or whose arrays are not of one stream.
    """
    with np.load(run / "predictions.npz") as stored:
        found = dict(stored)
    y = found["labels"]
    if y.ndim != 1 or not len(y) or y.dtype.kind not in "iu" or y.min() < 0:
        raise ValueError(f"labels of shape {y.shape}, {y.dtype}")
    for name, values in found.items():
        own, kinds = ((len(y), *values.shape[1:2]), "f") if name.startswith("p:") else ((len(y),), "iu")
        if values.shape != own or values.dtype.kind not in kinds:
            raise ValueError(f"'{name}' of shape {values.shape}, {values.dtype}, beside {len(y)} labels")
        if name.startswith("p:") and (values.ndim != 2 or values.shape[1] <= y.max()):
            raise ValueError(f"'{name}' of shape {values.shape}, and the class {y.max()} among the labels")
    return found


def kept_rows(run: Path) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.int64], NDArray[np.str_]]:
    """Every row's predictions, labels, and the setting of each image: its task, base or novel, the family of a shift, or a domain.

    One setting for all where a run has no two, or more than can be told apart. Raises FolderError if it cannot be read.
    """
    with reading(run, "no predictions", FINISHED):
        stored = kept_arrays(run)
    y, rows = stored["labels"], {name.removeprefix("p:"): values for name, values in stored.items() if name.startswith("p:")}
    file = run / "summary.json"
    with reading(file, "a summary that cannot be read", "expected that of a finished run"):
        summary = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        found = _settings(summary, y, stored.get("domains"))
    return rows, y, found if 1 < len(np.unique(found)) <= MOST_SETTINGS else np.full(len(y), "all")


def _settings(summary: dict[str, Any], y: NDArray[np.int64], domains: NDArray[np.int64] | None) -> NDArray[np.str_]:
    whole = next((row for row in summary.get("methods", {}).values() if row["covers"] is None), None)
    if whole is None or domains is None:
        return np.full(len(y), "all")
    if tasks := summary.get("tasks"):
        return np.array([next((task for task, own in tasks.items() if class_ in own), "none") for class_ in _names(whole, y)])
    if novel := summary.get("classes", {}).get("novel"):
        return np.array(["novel" if name in novel else "base" for name in _names(whole, y)])
    of = dict(zip(np.unique(domains).tolist(), whole["per_domain"], strict=True))
    if whole.get("per_family"):
        of = {number: name.rpartition(" ")[0] for number, name in of.items()}
    return np.array([of[number] for number in domains.tolist()])


def _names(row: dict[str, Any], y: NDArray[np.int64]) -> list[str]:
    """The class of every image, of a row that has those of the stream, in the order of their labels."""
    of = dict(zip(np.unique(y).tolist(), row["per_class"], strict=True))
    return [of[label] for label in y.tolist()]


def _entropy(q: Float) -> Float:
    found: Float = -(q * np.log(q)).sum(1)
    return found


def share_of(first: Float, second: Float) -> Float:
    """first / (first + second); a half where both are 0."""
    total = first + second
    return np.where(total > 0, first / np.maximum(total, np.finfo(float).tiny), 0.5)


def _pearson(a: Float, b: Float) -> float | None:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None
