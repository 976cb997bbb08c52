"""What stands on the axes of several plots: names at the ends of lines, and the moments at which experts came or went.

What a plot shows of many batches, many sites, many experts: as much as can be told apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedmerge.report.plots.svg import readable
from fedmerge.report.records import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
from typing import Any

from numpy.typing import NDArray


def mark_changes(axes: Axes, record: RunRecord) -> None:
    """A line before each batch at which experts came or went."""
    for change in record.changes:
        if change.start > 0:
            axes.axvline(change.start - 0.5, color="#1c1c1e", lw=0.9, ls=(0, (4, 3)))


def apart(values: dict[str, float], gap: float) -> dict[str, float]:
    """Where names stand: at their values, in the same order, or above them where they would be nearer to each other than `gap`."""
    places, place = dict[str, float](), -np.inf
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        places[name] = place = max(value, place + gap)
    return places


AROUND, LINE = 0.55, 0.15
"""Inches of a figure's height beside its axes, and of a line of small text."""


def label_ends(axes: Axes, ends: dict[str, float], shade: dict[str, str], batches: int) -> None:
    """Names at the right end of their lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    lines = (axes.figure.get_figure(root=True).get_size_inches()[1] - AROUND) / LINE
    for name, place in apart(ends, (high - low) / lines).items():
        axes.annotate(
            name,
            (batches - 1, ends[name]),
            xytext=(1.015, place),
            textcoords=axes.get_yaxis_transform(),
            color=readable(shade[name]),
            fontsize=8,
            va="center",
            annotation_clip=False,
        )


MOST_POINTS = 600
"""Points of a line, or of a stack, that a plot of this width can show."""

MOST_SHARES = 8
"""Colors of a stack that can be told apart."""

MOST_EXPERTS = 8
"""Single experts that are named in a plot; of more, the best alone is."""


def points(batches: int) -> NDArray[np.int64]:
    """The batches at which a line is drawn: all of them, or evenly spread ones, the last among them."""
    if batches <= MOST_POINTS:
        return np.arange(batches)
    return np.linspace(0, batches - 1, MOST_POINTS).round().astype(np.int64)


def binned(shares: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Middles (B,) of runs of batches and the mean of shares (T, K) over each, (B, K); every batch by itself if they are few."""
    batches = len(shares)
    if batches <= MOST_POINTS:
        return np.arange(batches, dtype=np.float64), shares
    edges = np.linspace(0, batches, MOST_POINTS + 1).round().astype(np.int64)
    sizes = np.diff(edges)
    return (edges[:-1] + edges[1:] - 1) / 2, np.add.reduceat(shares, edges[:-1], axis=0) / sizes[:, None]


def largest(shares: NDArray[np.float64], names: list[str]) -> tuple[NDArray[np.float64], list[str]]:
    """Shares (T, K) of the names with most of them, in their order, and all others as one; unchanged if they are few."""
    if len(names) <= MOST_SHARES:
        return shares, names
    first = np.sort(np.argsort(-shares.mean(0)[: len(names)], kind="stable")[: MOST_SHARES - 1])
    others = np.setdiff1d(np.arange(shares.shape[1]), first)
    together = np.concatenate([shares[:, first], shares[:, others].sum(1, keepdims=True)], 1)
    return together, [*(names[k] for k in first), f"{len(others)} others"]


def named(methods: dict[str, dict[str, Any]]) -> list[str]:
    """The rows of a summary that a plot names: all, but of many single experts only the most accurate."""
    experts = [name for name in methods if name.startswith("expert:")]
    if len(experts) <= MOST_EXPERTS:
        return list(methods)
    best = max(experts, key=lambda name: methods[name]["accuracy"])
    return [name for name in methods if name not in experts or name == best]
