"""The tables of a sweep: every method under every setting, over seeds, against the mean on the same streams."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmerge.report.metrics.significance import over_seeds, standard_error

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
    """All lines, by setting in the order of the sweep, and within it by falling accuracy.

    keys: what was swept. missing: names of cells that failed, and that no line knows.
    """

    lines: tuple[Line, ...]
    keys: tuple[str, ...]
    targets: bool
    missing: tuple[str, ...] = ()

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]], missing: tuple[str, ...] = ()) -> Grid:
        """From one row for each cell: seed, target, settings, and the methods of its summary."""
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            groups.setdefault(f"{row['target']}{row['settings']}", []).append(row)
        lines: list[Line] = []
        for group in groups.values():
            methods = [name for name in group[0]["methods"] if all(name in row["methods"] for row in group)]
            found = [_line(group, name) for name in methods]
            lines += sorted(found, key=lambda line: (not line.ranked, -line.accuracy))
        return Grid(tuple(lines), tuple(rows[0]["settings"]), any(row["target"] for row in rows), missing)

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
                _marked(line),
                str(len(line.seeds)),
                *_with_interval(line.accuracies, ""),
                f"{100 * sum(line.balanced) / len(line.balanced):.1f}",
                *_with_interval(line.gains, "+"),
            ]
            for line in self.lines
        ]

    def brief(self) -> list[list[str]]:
        """Header and rows for a terminal: each interval in one column, and none over one seed."""
        names = self.header()
        first = names.index("method") + 1
        shown = [[*names[:first], "accuracy", "95% interval", "minus mean", "95% interval"]]
        for row in self.cells():
            value, low, high, _, gain, gain_low, gain_high = row[first + 1 :]
            ranges = [f"{a} to {b}" if a not in ("", "one seed") else "" for a, b in ((low, high), (gain_low, gain_high))]
            shown.append([*row[:first], value, ranges[0], gain, ranges[1]])
        return shown


@dataclass(frozen=True)
class DomainTable:
    """A row for each method, a column for each domain that was left out, and their mean: as papers on generalization print it.

    rows: what was swept and the method, then for each domain, and for all, the mean accuracy over seeds and its standard error.
    None where a method has no row in a domain (an expert in its own), or where one seed has no error; and no mean over domains
    where a cell is missing.
    """

    header: tuple[str, ...]
    domains: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[tuple[float, float | None] | None, ...]], ...]

    @staticmethod
    def of(grid: Grid) -> DomainTable | None:
        """From the lines of a grid over two targets or more; None for any other grid."""
        domains = tuple(dict.fromkeys(line.target for line in grid.lines))
        if not grid.targets or len(domains) < 2:
            return None
        found: dict[tuple[str, ...], dict[str, dict[str, Line]]] = {}
        for line in grid.lines:
            swept = tuple(plainly(line.settings[key]) for key in grid.keys)
            found.setdefault(swept, {}).setdefault(line.method, {})[line.target] = line
        rows: list[Any] = []
        for swept, methods in found.items():
            named = [(_marked(next(iter(lines.values()))), lines) for lines in methods.values()]
            these = [((*swept, name), _over_domains(lines, domains, whole=not grid.missing)) for name, lines in named]
            rows += sorted(these, key=lambda row: (row[1][-1] is None, "not ranked" in row[0][-1], -(row[1][-1] or (0,))[0]))
        return DomainTable((*grid.keys, "method"), domains, tuple(rows))

    def cells(self, missing: str = "-") -> list[list[str]]:
        """Header and rows as text, in percent, as `85.0 ± 1.2` over several seeds."""
        head = [*self.header, *self.domains, "mean"]
        return [head, *[[*names, *[_with_error(one, missing) for one in values]] for names, values in self.rows]]

    def as_csv(self) -> str:
        """Comma-separated values; standard errors over seeds in columns of their own, after those of the accuracies."""
        columns = [*self.domains, "mean"]
        several = any(value and value[1] is not None for _, values in self.rows for value in values)
        rows = [[*self.header, *columns, *([f"{name} error" for name in columns] if several else [])]]
        for names, values in self.rows:
            errors = ["" if one is None or one[1] is None else f"{100 * one[1]:.1f}" for one in values] if several else []
            rows.append([*names, *["" if one is None else f"{100 * one[0]:.1f}" for one in values], *errors])
        return _comma_separated(rows)


def _over_domains(lines: Mapping[str, Line], domains: Sequence[str], whole: bool) -> tuple[tuple[float, float | None] | None, ...]:
    """Mean and standard error over seeds for each domain, and if `whole` and each domain has a row, of the means over domains."""
    each = [lines[domain].accuracies if domain in lines else None for domain in domains]
    there = [one for one in each if one is not None]
    seeds = {lines[domain].seeds for domain in lines}
    whole = whole and len(there) == len(domains) and len(seeds) == 1
    over_all = [sum(of) / len(of) for of in zip(*there, strict=True)] if whole else None
    return tuple(None if one is None else (sum(one) / len(one), standard_error(one)) for one in [*each, over_all])


def _with_error(value: tuple[float, float | None] | None, missing: str) -> str:
    if value is None:
        return missing
    return f"{100 * value[0]:.1f}" + ("" if value[1] is None else f" ± {100 * value[1]:.1f}")


def _marked(line: Line) -> str:
    return line.method if line.ranked else f"{line.method} (not ranked)"


def plainly(value: Any) -> str:
    """A value without quotes and braces: {'kind': 'note', 'delta': 0.1} is "note, delta 0.1"."""
    if isinstance(value, Mapping):
        return ", ".join(plainly(inner) if key == "kind" else f"{key} {plainly(inner)}" for key, inner in value.items())
    return " ".join(plainly(inner) for inner in value) if isinstance(value, list | tuple) else str(value)


def as_csv(grid: Grid) -> str:
    """Comma-separated values."""
    return _comma_separated([grid.header(), *grid.cells()])


def as_markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, ["---"] * len(header), *cells])


def as_latex(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A LaTeX tabular with booktabs rules."""

    def line(row: Sequence[str]) -> str:
        return " & ".join(cell.translate(LATEX) for cell in row) + r" \\"

    columns = "l" * len(header)
    body = [line(row) for row in cells]
    head = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(header), r"\midrule"]
    return "\n".join([*head, *body, r"\bottomrule", r"\end{tabular}", ""])


LATEX = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "{": r"\{", "}": r"\}", "$": r"\$", "±": r"$\pm$"})


def _comma_separated(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


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
