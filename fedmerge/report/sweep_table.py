"""The tables of a sweep: every method under every setting, over seeds, against the mean on the same streams."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmerge.report.metrics.significance import over_seeds

REFERENCE = "mean"

MAJORITY = "majority class"
"""The commonest class of the stream for every image: what a table of accuracies is to be read against."""


@dataclass(frozen=True)
class Line:
    """One method under one setting. accuracies, balanced: one for each seed. gains: less the mean merge's; empty for the mean."""

    target: str
    settings: dict[str, Any]
    method: str
    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    balanced: tuple[float, ...]
    gains: tuple[float, ...]
    ranked: bool

    @property
    def accuracy(self) -> float:
        """Mean over seeds."""
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def gain(self) -> float | None:
        """Mean difference to the mean merge over seeds."""
        return sum(self.gains) / len(self.gains) if self.gains else None


@dataclass(frozen=True)
class Grid:
    """All lines, by setting in the order of the sweep, and within it by falling accuracy. keys: what was swept."""

    lines: tuple[Line, ...]
    keys: tuple[str, ...]
    targets: bool

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]]) -> Grid:
        """From one row for each cell: seed, target, settings, and the methods of its summary."""
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            groups.setdefault(f"{row['target']}{row['settings']}", []).append(row)
        lines: list[Line] = []
        for group in groups.values():
            methods = [name for name in group[0]["methods"] if all(name in row["methods"] for row in group)]
            found = [_line(group, name) for name in methods]
            lines += sorted(found, key=lambda line: (not line.ranked, -line.accuracy))
        return Grid(tuple(lines), tuple(rows[0]["settings"]), any(row["target"] for row in rows))

    def header(self) -> list[str]:
        """Names of the columns; low and high are the ends of 95% intervals over seeds."""
        swept = [*(["target"] if self.targets else []), *self.keys]
        return [*swept, "method", "seeds", "accuracy", "low", "high", "balanced", "minus mean", "minus mean low", "minus mean high"]

    def cells(self) -> list[list[str]]:
        """The table's rows as text, accuracies and differences in points; no interval over one seed."""
        return [
            [
                *([line.target] if self.targets else []),
                *[plainly(line.settings[key]) for key in self.keys],
                line.method if line.ranked else f"{line.method} (not ranked)",
                str(len(line.seeds)),
                *_with_interval(line.accuracies, ""),
                f"{100 * sum(line.balanced) / len(line.balanced):.1f}",
                *_with_interval(line.gains, "+"),
            ]
            for line in self.lines
        ]


def plainly(value: Any) -> str:
    """A value without quotes and braces: {'kind': 'note', 'delta': 0.1} is "note, delta 0.1"."""
    if isinstance(value, Mapping):
        return ", ".join(plainly(inner) if key == "kind" else f"{key} {plainly(inner)}" for key, inner in value.items())
    return " ".join(plainly(inner) for inner in value) if isinstance(value, list | tuple) else str(value)


def as_csv(grid: Grid) -> str:
    """Comma-separated values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([grid.header(), *grid.cells()])
    return text.getvalue()


def as_markdown(grid: Grid) -> str:
    """A Markdown table."""
    rows = [grid.header(), ["---"] * len(grid.header()), *grid.cells()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def as_latex(grid: Grid) -> str:
    """A LaTeX tabular with booktabs rules."""

    def line(cells: list[str]) -> str:
        return " & ".join(cell.translate(LATEX) for cell in cells) + r" \\"

    columns = "l" * len(grid.header())
    body = [line(cells) for cells in grid.cells()]
    head = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(grid.header()), r"\midrule"]
    return "\n".join([*head, *body, r"\bottomrule", r"\end{tabular}", ""])


LATEX = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "{": r"\{", "}": r"\}", "$": r"\$"})


def _line(group: Sequence[Mapping[str, Any]], name: str) -> Line:
    values = [row["methods"][name]["accuracy"] for row in group]
    compared = name not in (REFERENCE, MAJORITY) and all(REFERENCE in row["methods"] for row in group)
    gains = [row["methods"][name]["accuracy"] - row["methods"][REFERENCE]["accuracy"] for row in group] if compared else []
    return Line(
        target=str(group[0]["target"] or ""),
        settings=dict(group[0]["settings"]),
        method=name,
        seeds=tuple(row["seed"] for row in group),
        accuracies=tuple(values),
        balanced=tuple(row["methods"][name]["balanced_accuracy"] for row in group),
        gains=tuple(gains),
        ranked=bool(group[0]["methods"][name]["ranked"]),
    )


def _with_interval(values: Sequence[float], sign: str) -> list[str]:
    """Mean and t interval over seeds in points."""
    if not values:
        return ["", "", ""]
    reach = over_seeds(values)
    low, high = (f"{100 * reach[0]:{sign}.1f}", f"{100 * reach[1]:{sign}.1f}") if reach else ("one seed", "one seed")
    return [f"{100 * sum(values) / len(values):{sign}.1f}", low, high]
