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


def label_ends(axes: Axes, ends: dict[str, float], shade: dict[str, str], batches: int) -> None:
    """Names at the right end of their lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) / 19
    place = -np.inf
    for name, value in sorted(ends.items(), key=lambda item: item[1]):
        place = max(value, place + gap)
        axes.annotate(
            name,
            (batches - 1, value),
            xytext=(batches * 1.015, place),
            color=shade[name],
            fontsize=8,
            va="center",
            annotation_clip=False,
        )
