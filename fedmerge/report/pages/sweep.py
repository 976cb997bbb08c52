"""The page of a sweep: small multiples, one panel for each method, and the whole table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmerge.report.metrics.significance import over_seeds
from fedmerge.report.pages._render import fill
from fedmerge.report.plots.svg import PALETTE, QUIET, STYLE, as_source, as_svg
from fedmerge.report.sweep_table import REFERENCE, DomainTable, Grid, Line, as_csv, as_latex, as_markdown, plainly
from fedmerge.system.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_grid(out: Path, grid: Grid, title: str) -> None:
    """`sweep.csv`, `.md`, `.tex`, and `sweep.html` with small multiples; over several targets `domains.csv`, `.md`, `.tex`, too."""
    out.mkdir(parents=True, exist_ok=True)
    whole = grid.header(), grid.cells()
    note = f"\nMissing, because they failed: {', '.join(grid.missing)}.\n" if grid.missing else ""
    texts = {
        "sweep.csv": as_csv(grid),
        "sweep.md": as_markdown(*whole) + note,
        "sweep.tex": as_latex(*whole),
        "sweep.html": page(grid, title),
    }
    if table := DomainTable.of(grid):
        header, *cells = table.cells()
        texts |= {
            "domains.csv": table.as_csv(),
            "domains.md": as_markdown(header, cells) + note,
            "domains.tex": as_latex(header, cells),
        }
    for name, text in texts.items():
        atomic_write(out / name, text)


COLUMNS = 4
ROOM = 5
"""Points above and below what is shown."""

OWN, MEAN = PALETTE[0], QUIET


def page(grid: Grid, title: str) -> str:
    """The page as text; its picture is inside it."""
    import matplotlib as mpl

    seeds = max(len(line.seeds) for line in grid.lines)
    table = DomainTable.of(grid)
    with mpl.rc_context(STYLE):
        picture = as_source(as_svg(multiples_plot(grid)))
    domains = table.cells() if table else []
    more: dict[str, Any] = {"header": grid.header(), "cells": grid.cells(), "missing": grid.missing}
    return fill("grid", title=title, picture=picture, seeds=seeds, domains=domains, **more)


def multiples_plot(grid: Grid) -> Figure:
    """Accuracy over the settings, one panel for each method, above the mean merge's in gray; bars are t intervals over seeds."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(_label(grid, line) for line in grid.lines))
    by_method: dict[str, dict[str, Line]] = {}
    for line in grid.lines:
        by_method.setdefault(line.method, {})[_label(grid, line)] = line
    rows = -(-len(by_method) // COLUMNS)
    figure = Figure(figsize=(2.6 * COLUMNS, 0.7 + 1.9 * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)).ravel()
    for axes, (method, lines) in zip(panels, by_method.items(), strict=False):
        if method != REFERENCE and REFERENCE in by_method:
            _draw(axes, labels, by_method[REFERENCE], MEAN, False)
        _draw(axes, labels, lines, OWN, True)
        axes.set_title(method, fontsize=9, loc="left")
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        axes.tick_params(axis="y", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for number, axes in enumerate(panels):
        axes.set_visible(number < len(by_method))
        axes.tick_params(labelbottom=number + COLUMNS >= len(by_method))
    merged = [100 * line.accuracy for line in grid.lines if not line.method.startswith("expert")]
    if merged:  # a single poor expert would flatten all other panels
        low = max(0, min(merged) - ROOM)
        panels[0].set_ylim(low, min(100.5, max(merged) + ROOM))
        for axes, (method, lines) in zip(panels, by_method.items(), strict=False):
            highest = max(100 * line.accuracy for line in lines.values())
            if highest < low:
                axes.set_title(f"{method}: below, at most {highest:.0f}", fontsize=9, loc="left")
    figure.supylabel("accuracy, %", fontsize=8)
    return figure


def _draw(axes: Axes, labels: list[str], lines: dict[str, Line], color: str, bars: bool) -> None:
    at = [i for i, label in enumerate(labels) if label in lines]
    values = [100 * lines[labels[i]].accuracy for i in at]
    axes.plot(at, values, "o-", color=color, ms=3, lw=1)
    for i in at:
        reach = over_seeds(lines[labels[i]].accuracies) if bars else None
        if reach:
            axes.plot([i, i], [max(0, 100 * reach[0]), min(100, 100 * reach[1])], color=color, lw=1, alpha=0.5)


def _label(grid: Grid, line: Line) -> str:
    words = [*([line.target] if grid.targets else []), *[plainly(line.settings[key]) for key in grid.keys]]
    return ", ".join(words) or "as it is"
