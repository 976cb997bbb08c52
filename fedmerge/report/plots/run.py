"""The report's plots, as SVG. One color per method and per site in all of them, from a palette for color-blind people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.merging.methods.wise_ft import WiseFt
from fedmerge.report.plots.layout import AROUND, LINE, apart, binned, label_ends, largest, mark_changes, named, points
from fedmerge.report.plots.svg import ON_BRIGHT, ON_DIM, PALETTE, QUIET, STYLE, as_svg, readable
from fedmerge.report.records import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.6
MOST_LEVEL = 6
"""Labels that stand beside one another; more are turned."""


def draw(record: RunRecord, summary: dict[str, Any]) -> dict[str, str]:
    """Every plot by name, as the text of an SVG file."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        plots = {
            "accuracy": as_svg(accuracy_plot(record, summary)),
            "running": as_svg(running(record, summary)),
            "domains": as_svg(domains(record, summary)),
            "cost": as_svg(cost_plot(record, summary)),
        }
        if record.stream.conditions:
            plots["severity"] = as_svg(severity(record, summary))
        if record.parts:
            plots["robustness"] = as_svg(robustness(record, summary))
        adaptive = [name for name in record.methods if record.steps_of(name)[0].encoder is not None]
        plots |= {f"coefficients-{i}": as_svg(coefficients(record, name)) for i, name in enumerate(adaptive)}
    return plots


def colors(record: RunRecord) -> dict[str, str]:
    """A color for each method; single experts are gray, since there are many of them."""
    named = [name for name in record.methods if not name.startswith("expert")]
    return dict.fromkeys(record.methods, QUIET) | {n: PALETTE[i % len(PALETTE)] for i, n in enumerate(named)}


def accuracy_plot(record: RunRecord, summary: dict[str, Any]) -> Figure:
    """Accuracy with its interval, the best on top."""
    names = sorted(summary["methods"], key=lambda name: summary["methods"][name]["accuracy"])
    figure, axes = _figure(0.9 + 0.27 * len(names))
    shade = colors(record)
    for row, name in enumerate(names):
        values = summary["methods"][name]
        low, high = (100 * end for end in values["ci95"])
        axes.plot([low, high], [row, row], color=shade[name], lw=2, solid_capstyle="round")
        axes.plot(100 * values["accuracy"], row, "o", color=shade[name], ms=6)
    if "mean" in summary["methods"]:
        axes.axvline(100 * summary["methods"]["mean"]["accuracy"], color=QUIET, lw=0.8, ls=":")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"accuracy over the stream, % (95% interval over {summary['intervals']['over']}; dotted: the mean)")
    return figure


def running(record: RunRecord, summary: dict[str, Any]) -> Figure:
    """Accuracy in a moving window of batches, so that a change of the stream shows."""
    window = max(3, record.stream.batches // 12)
    figure, axes = _figure(max(3.4, AROUND + LINE * len(named(summary["methods"]))))
    shade, last = colors(record), dict[str, float]()
    for name in record.methods:
        steps = record.steps_of(name)
        smooth = 100 * _moving(np.array([s.correct for s in steps]), np.array([s.n for s in steps]), window)
        last[name] = float(smooth[-1])
        expert = name.startswith("expert")
        at = np.flatnonzero(record.covered(name))
        some = points(len(at))
        axes.plot(
            at[some],
            smooth[some],
            color=shade[name],
            lw=0.9 if expert else 1.8,
            ls="--" if expert else "-",
            zorder=1 if expert else 2,
        )
    mark_changes(axes, record)
    label_ends(axes, {name: last[name] for name in named(summary["methods"])}, shade, record.stream.batches)
    axes.set_xlabel(f"batch (mean of {window} batches)")
    axes.set_ylabel("accuracy, %")
    axes.margins(x=0)
    return figure


def coefficients(record: RunRecord, method: str) -> Figure:
    """What the stream was made of, and what the method made of it: encoder and head, stacked to 1."""
    from matplotlib.figure import Figure

    encoder, head = record.coefficients(method, "encoder"), record.coefficients(method, "head")
    assert encoder and head
    panels: list[tuple[str, NDArray[np.float64], list[str], tuple[str, ...]]] = [
        ("the stream's true mix", *record.stream.mix, PALETTE),
        (f"{method}: encoder", *encoder, PALETTE),
        (f"{method}: head", *head, PALETTE),
    ]
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    grid = figure.subplots(3, 1, sharex=True)
    for axes, (title, whole, everyone, palette) in zip(grid, panels, strict=True):
        shares, names = largest(whole, everyone)
        at, shares = binned(shares)
        shade = [palette[i % len(palette)] for i in range(len(names))]
        shade[len(names) - 1 :] = [QUIET] if len(names) < len(everyone) else shade[-1:]
        axes.stackplot(at, shares.T, labels=names, colors=shade, lw=0, alpha=0.9)
        axes.set_ylim(0, 1)
        axes.set_title(title, loc="left", fontsize=9)
        axes.margins(x=0)
        mark_changes(axes, record)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    grid[-1].set_xlabel("batch")
    return figure


def robustness(record: RunRecord, summary: dict[str, Any]) -> Figure:
    """Accuracy in the domains that hospitals train on against that in the others; WiSE-FT's rows are one curve of its share."""
    figure, axes = _figure(4.2)
    rows = {name: row["by_part"] for name, row in summary["methods"].items() if None not in row["by_part"].values()}
    at = {name: (100 * part["in_domain"], 100 * part["out_of_domain"]) for name, part in rows.items()}
    shade = colors(record)
    curve = sorted((name for name in at if record.methods[name].paper == WiseFt.paper), key=lambda name: _share(record, name))
    if curve:
        axes.plot(*zip(*(at[name] for name in curve), strict=True), "o-", ms=3, lw=1.2, color=QUIET)
        for name in (curve[0], curve[-1]):
            axes.annotate(
                f"a = {_share(record, name):g}", at[name], (4, -10), textcoords="offset points", fontsize=8, color="#666666"
            )
    for name in (name for name in at if name not in curve):
        ranked = summary["methods"][name]["ranked"]
        axes.plot(*at[name], "o" if ranked else "x", color=shade[name], ms=6, label=name if ranked else f"{name} (not ranked)")
    axes.set_xlabel(f"accuracy in {', '.join(record.parts['in_domain'])}, % (hospitals train on it)")
    axes.set_ylabel(f"mean accuracy in {', '.join(record.parts['out_of_domain'])}, %")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return figure


def _share(record: RunRecord, name: str) -> float:
    return float(record.methods[name].hyper_parameters["a"])


def domains(record: RunRecord, summary: dict[str, Any]) -> Figure:
    """Accuracy of every method in every domain of the target, or under every family of shifts."""
    of = "per_family" if record.stream.conditions else "per_domain"
    rows = {name: row[of] for name, row in summary["methods"].items()}
    names = sorted(rows, key=lambda name: -summary["methods"][name]["accuracy"])
    columns = max((list(row) for row in rows.values()), key=len)  # a row that covers a part of the stream may lack some
    table = np.array([[100 * rows[name].get(column, np.nan) for column in columns] for name in names])
    figure, axes = _figure(0.9 + 0.27 * len(names))
    axes.imshow(table, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(np.nan_to_num(table, nan=-1)):
        shade = ON_BRIGHT if value > 55 else ON_DIM
        axes.text(column, row, f"{value:.0f}" if value >= 0 else "", ha="center", va="center", color=shade, fontsize=8)
    crowded = len(columns) > MOST_LEVEL
    axes.set_xticks(range(len(columns)), columns, rotation=40 if crowded else 0, ha="right" if crowded else "center")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("accuracy by domain of the target, %" if of == "per_domain" else "accuracy by family, %", loc="left", fontsize=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def severity(record: RunRecord, summary: dict[str, Any]) -> Figure:
    """How accuracy falls as shifts grow, the mean over families."""
    figure, axes = _figure(3.4)
    shade, ends = colors(record), {}
    for name, row in summary["methods"].items():
        levels = [int(level) for level in row["per_severity"]]
        values = [100 * value for value in row["per_severity"].values()]
        expert = name.startswith("expert")
        axes.plot(levels, values, "o--" if expert else "o-", color=shade[name], ms=3, lw=0.9 if expert else 1.8)
        ends[name] = values[-1]
    label_ends(axes, {name: ends[name] for name in named(summary["methods"])}, shade, max(levels) + 1)
    axes.set_xticks(levels)
    axes.set_xlabel("severity")
    axes.set_ylabel("accuracy, mean over families, %")
    return figure


def cost_plot(record: RunRecord, summary: dict[str, Any]) -> Figure:
    """Accuracy against forwards per batch: what a gain costs."""
    figure, axes = _figure(3.0)
    shade, told = colors(record), named(summary["methods"])
    columns: dict[float, dict[str, float]] = {}
    for name, values in summary["methods"].items():
        forwards, right = values["forwards_per_batch"], 100 * values["accuracy"]
        axes.plot(forwards, right, "o", color=shade[name], ms=7)
        if name in told:
            columns.setdefault(forwards, {})[name] = right
    axes.margins(x=0.15, y=0.15)
    axes.set_xlim(left=0)
    low, high = axes.get_ylim()
    for forwards, column in columns.items():
        for name, place in apart(column, (high - low) / 17).items():
            beside: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(name, (forwards, place), color=readable(shade[name]), fontsize=8, **beside)
    axes.set_xlabel("forwards of a batch through one model, if the method ran alone")
    axes.set_ylabel("accuracy, %")
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _moving(correct: NDArray[Any], sizes: NDArray[Any], window: int) -> NDArray[np.float64]:
    """Accuracy over the last `window` batches, fewer at the beginning."""
    starts = np.maximum(np.arange(len(sizes)) - window + 1, 0)
    right, seen = np.concatenate([[0], correct.cumsum()]), np.concatenate([[0], sizes.cumsum()])
    ends = np.arange(len(sizes)) + 1
    accuracies: NDArray[np.float64] = (right[ends] - right[starts]) / (seen[ends] - seen[starts])
    return accuracies
