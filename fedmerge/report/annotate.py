"""What stands on the axes of several plots: names at the ends of lines, and the moments at which experts came or went."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedmerge.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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


def label_ends(axes: Axes, ends: dict[str, float], shade: dict[str, str], batches: int) -> None:
    """Names at the right end of their lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    for name, place in apart(ends, (high - low) / 19).items():
        axes.annotate(
            name,
            (batches - 1, ends[name]),
            xytext=(batches * 1.015, place),
            color=shade[name],
            fontsize=8,
            va="center",
            annotation_clip=False,
        )
