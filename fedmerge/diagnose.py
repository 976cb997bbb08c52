"""Why an entropy-adaptive merge works in a run, or does not: what its kept predictions say of the experts' entropies."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from fedmerge.report.picture import console
from fedmerge.report.trust import Trust, as_rows, how_many_right, kept_predictions, trust

VERDICTS = (
    (0.75, "entropy is a good guide here"),
    (0.6, "entropy is some guide here"),
    (0.5, "entropy hardly guides here"),
    (0.0, "entropy misleads here"),
)
"""Least share of cases in which the surer expert is the better, and words for it: a convention."""


def diagnose(run: Path) -> None:
    """Print a table and a few words, and leave `diagnose.json` in the run's folder. Raises FolderError if it is no finished run."""
    p, y = kept_predictions(run)
    found, right = trust(p, y), how_many_right(p, y)
    out = console()
    out.print(table(found))
    for line in words(found, right):
        out.print(line, markup=False)
    content = {"experts": list(p), "right_experts": right, "trust": as_rows(found)}
    (run / "diagnose.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def table(found: list[Trust]) -> Table:
    """One row for each pair and split."""
    shown = Table(title="entropy ratio against cross-entropy ratio")
    shown.add_column("experts")
    shown.add_column("images")
    for name in ("samples", "Pearson", "Spearman", "surer is better"):
        shown.add_column(name, justify="right")
    for one in found:
        numbers = ["undefined" if value is None else f"{value:+.2f}" for value in (one.pearson, one.spearman)]
        sides = "" if one.sides is None else f"{one.sides:.0%}"
        shown.add_row(" / ".join(one.pair), one.split, str(one.samples), *numbers, sides)
    return shown


def words(found: list[Trust], right: list[int]) -> list[str]:
    """What it means, without saying more than it does."""
    total, K = sum(right), len(right) - 1
    one_right = [one for one in found if one.split == "one right" and one.sides is not None]
    samples = sum(one.samples for one in one_right)
    said = [
        f"On {right[K] / total:.0%} of {total} images all {K} experts are right, on {right[0] / total:.0%} none is: "
        "only between them can weights decide anything by choosing among experts."
    ]
    if samples:
        sides = sum(one.samples * one.sides for one in one_right if one.sides is not None) / samples
        verdict = next(text for least, text in VERDICTS if sides >= least)
        said.append(f"Where one of a pair is right and the other wrong, the surer is better in {sides:.0%} of cases: {verdict}.")
    return said
