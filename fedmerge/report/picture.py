"""The picture of a scenario before it runs, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

SHADES = " ░▒▓█"
COLUMNS = 60


def site_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """One row for each site, with the keys of the first as columns."""
    table = Table(title="sites")
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if number in (0, len(rows[0]) - 1) else "right")
    for row in rows:
        table.add_row(*row.values())
    return table


def stripes(names: Sequence[str], shares: NDArray[np.float64], columns: int = COLUMNS) -> list[str]:
    """One line for each name: its share over time, from blank to full. shares: (T, len(names)), in [0, 1]."""
    count = min(columns, len(shares))
    parts = np.array_split(shares, count)
    means = np.stack([part.mean(0) for part in parts])
    width = max(len(name) for name in names)
    lines = []
    for column, name in enumerate(names):
        levels = np.ceil(means[:, column] * (len(SHADES) - 1) - 1e-9).astype(int)
        lines.append(f"{name:>{width}} |{''.join(SHADES[level] for level in levels)}|")
    return lines


def histogram(counts: Mapping[str, int]) -> str:
    """Counts of classes as bars of eighths, in label order: ▁ is few, █ the most frequent, a dot is none."""
    most = max([*counts.values(), 1])
    return "".join("·" if count == 0 else "▁▂▃▄▅▆▇█"[min(7, int(8 * count / most))] for count in counts.values())


def duration(seconds: float) -> str:
    """Rounded to what an estimate is worth."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def console() -> Console:
    """Plain and wide where there is no terminal."""
    found = Console(highlight=False)
    if not found.is_terminal:
        found.width = 120
    return found
