"""Two runs side by side, on the terminal and as a page."""

from __future__ import annotations

from rich.table import Table

from fedmerge.report.comparison import Comparison
from fedmerge.report.pages._render import fill
from fedmerge.report.terminal import console, p_value

HEADER = ("method", "first, %", "second, %", "second minus first, points", "95% interval", "p (Holm)")


def show_comparison(found: Comparison) -> None:
    """Print it."""
    out = console()
    for number, run in (("first", found.first), ("second", found.second)):
        out.print(f"{number}: {run.path}", markup=False)
    over, count = found.units[0], found.units[1]
    table = Table(title=f"on the same {found.rows[0].images} images; paired 95% intervals over {count} {over}")
    for at, name in enumerate(HEADER):
        table.add_column(name, justify="right" if at else "left", no_wrap=not at)
    for row in cells(found):
        table.add_row(*row)
    out.print(table)
    for line in found.alone:
        out.print(line, markup=False)
    if not found.changed:
        out.print("scenarios and machines are the same")
        return
    changed = Table(title="what differs between the runs")
    for name in ("key", "first", "second"):
        changed.add_column(name, overflow="fold")
    for key, one, other in found.changed:
        changed.add_row(key, one, other)
    out.print(changed)


def cells(found: Comparison) -> list[list[str]]:
    """The table's rows as text."""
    rows = []
    for row in found.rows:
        low, high = (100 * value for value in row.difference.ci95)
        gain = f"{100 * row.difference.difference:+.1f}"
        accuracies = [f"{100 * value:.1f}" for value in (row.first, row.second)]
        rows.append([row.method, *accuracies, gain, f"{low:+.1f} to {high:+.1f}", p_value(row.p_holm)])
    return rows


def comparison_page(found: Comparison) -> str:
    """One HTML file that needs no other."""
    reach = max(max(map(abs, row.difference.ci95)) for row in found.rows)
    scale = 48 / max(reach, 1e-6)  # of a bar 100 wide, whose middle is no difference
    bars = [
        {"low": 50 + scale * low, "width": max(0.5, scale * (high - low)), "at": 50 + scale * row.difference.difference}
        for row in found.rows
        for low, high in [row.difference.ci95]
    ]
    rows = list(zip(cells(found), bars, strict=True))
    return fill("compare", c=found, header=HEADER, rows=rows, reach=f"{100 * reach:.1f}")
