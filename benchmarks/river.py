"""The picture of README.md: what a stream is made of, what two methods make of it, and how often they are right.

python -m fedmerge.simulate scenarios/organs.yaml --methods mean,eam,posterior,expert --out runs/river
python benchmarks/river.py runs/river --out docs/river.svg
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedmerge.report.plots.layout import apart
from fedmerge.report.plots.svg import PALETTE, QUIET, STYLE, readable

WINDOW = 5
"""Batches of which the lower panel shows the mean."""
SHOWN = ("eam", "posterior")


def river(axes: Axes, title: str, shares: NDArray[np.float64], names: list[str]) -> None:
    """Shares (T, n), stacked to 1."""
    shades = [*PALETTE[: len(names) - ("theta_0" in names)], QUIET]
    axes.stackplot(np.arange(len(shares)), shares.T, labels=names, colors=shades, lw=0, alpha=0.9)
    axes.set(ylim=(0, 1), yticks=(0, 1))
    axes.set_title(title, loc="left", fontsize=9)
    axes.margins(x=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)


def draw(run: Path) -> Figure:
    """The figure of one run."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    steps: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in (run / "batches.jsonl").read_text(encoding="utf-8").splitlines():
        step = json.loads(line)
        steps[step["method"]].append(step)
    with np.load(run / "predictions.npz") as stored:
        domains, batch = stored["domains"], stored["batch"]
    planes = list(summary["methods"]["mean"]["per_domain"])
    truth = np.stack([np.bincount(domains[batch == t], minlength=len(planes)) for t in range(batch.max() + 1)]).astype(float)
    accuracy = {name: 100 * row["accuracy"] for name, row in summary["methods"].items()}
    best = max((name for name in accuracy if name.startswith("expert:")), key=lambda name: accuracy[name])
    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    top, *middle, bottom = figure.subplots(2 + len(SHOWN), 1, sharex=True, height_ratios=[1] * (1 + len(SHOWN)) + [1.8])
    river(top, "what the stream is made of", truth / truth.sum(1, keepdims=True), [f"{plane} images" for plane in planes])
    experts = [name.removeprefix("expert:") for name in accuracy if name.startswith("expert:")]
    for axes, name in zip(middle, SHOWN, strict=True):
        given = np.array([step["encoder"] for step in steps[name]])
        names = [f"{expert} expert" for expert in experts] + ["theta_0"] * (given.shape[1] > len(experts))
        river(axes, f"what {name} merges for it", given, names)
    shades = {"mean": "#444444", "eam": PALETTE[4], "posterior": PALETTE[3], best: QUIET}
    moving = np.ones(WINDOW) / WINDOW
    for name, shade in shades.items():
        right = np.array([step["correct"] / step["n"] for step in steps[name]])
        smooth = np.convolve(100 * right, moving, "valid")
        bottom.plot(np.arange(len(smooth)) + WINDOW // 2, smooth, color=shade, lw=1.8, ls="--" if name == best else "-")
    low, high = bottom.get_ylim()
    for name, place in apart({name: accuracy[name] for name in shades}, (high - low) / 8).items():
        told = f"{name.replace('expert:', 'best expert: ')}  {accuracy[name]:.1f} %"
        bottom.annotate(
            told, (1.01, place), xycoords=("axes fraction", "data"), color=readable(shades[name]), fontsize=8, va="center"
        )
    bottom.set_title(f"accuracy, % (mean of {WINDOW} batches; at the right: of the whole stream)", loc="left", fontsize=9)
    bottom.set_xlabel("batch")
    return figure


def main(
    run: Annotated[Path, typer.Argument(help="a run of organs.yaml with mean, eam, posterior and experts")],
    out: Annotated[Path, typer.Option(help="the SVG file")] = Path("docs/river.svg"),
) -> None:
    """Draw RUN."""
    with mpl.rc_context(STYLE):
        draw(run).savefig(out, metadata={"Date": None, "Creator": "fedmerge"}, facecolor="white")


if __name__ == "__main__":
    typer.run(main)
