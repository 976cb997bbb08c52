"""`diagnose.html` and its plots: whether entropies tell who is right, what methods did with them, and how experts lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.report.metrics.decisions import WHO, Signals, by_who, quadrants
from fedmerge.report.metrics.entropy_trust import Trust, ratios
from fedmerge.report.pages._render import fill
from fedmerge.report.plots.svg import ON_BRIGHT, ON_DIM, PALETTE, QUIET, STYLE, as_source, as_svg
from fedmerge.report.summary import influence
from fedmerge.system.files import atomic_write, reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedmerge.merging.geometry.drift import Drift

SHADE = {"both right": "#0072B2", "one right": "#D55E00", "both wrong": QUIET}
MOST = 1500
"""Images shown as points; more would hide each other."""

MOST_PAIRS = 6
"""Pairs whose images are drawn one by one; tables have all."""

PARTS = ("both", "encoder", "head")


@dataclass(frozen=True)
class Decisions:
    """What choices between models had to go by. settings: of each image. entropies: of every row of the run."""

    pairs: list[Signals]
    settings: NDArray[np.str_]
    entropies: list[dict[str, Any]]

    def as_row(self) -> dict[str, Any]:
        """Plain records, for `diagnose.json`."""
        by_setting = [
            {
                "pair": list(one.pair),
                "setting": str(name),
                "share": float(one.share[here].mean()),
                "apart": float(one.apart[here].mean()),
            }
            for one in self.pairs
            for name in np.unique(self.settings)
            for here in [self.settings == name]
        ]
        return {
            "by_setting": by_setting,
            "by_who": [row for one in self.pairs for row in by_who(one)],
            "quadrants": [row for one in self.pairs for row in quadrants(one)],
            "entropies": self.entropies,
        }


@dataclass(frozen=True)
class Diagnosis:
    """All that the page shows. p: expert -> (samples, C). coefficients: method -> part -> (T, K). drifts: raw, and as learned."""

    name: str
    words: list[str]
    p: dict[str, NDArray[np.float32]]
    y: NDArray[np.int64]
    trust: list[Trust]
    right: list[int]
    coefficients: dict[str, dict[str, NDArray[np.float64]]]
    drifts: tuple[Drift, Drift] | None
    paths: list[dict[str, Any]]
    decided: Decisions


def kept_coefficients(run: Path) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Coefficients of encoder and head that every adaptive method chose, batch by batch. Raises FolderError.

    None of them where hospitals came or went: a column would not always mean the same expert.
    """
    if changes_of(run):
        return {}
    found: dict[str, dict[str, list[list[float]]]] = {}
    filled: dict[str, dict[str, NDArray[np.float64]]] = {}
    file = run / "batches.jsonl"
    with reading(file, "lines that cannot be read", "expected those of a finished run"):
        for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            line = json.loads(text)
            if line["encoder"] is not None:
                parts = found.setdefault(line["method"], {"encoder": [], "head": []})
                parts["encoder"].append(line["encoder"])
                parts["head"].append(line["head"])
        filled |= {name: {part: _filled(rows) for part, rows in parts.items()} for name, parts in found.items()}
    return filled


def _filled(rows: list[list[float]]) -> NDArray[np.float64]:
    """(T, K), with 0 for a model such as theta_0 that a method had no use for in a batch."""
    width = max(map(len, rows))
    return np.array([[*row, *[0.0] * (width - len(row))] for row in rows])


def changes_of(run: Path) -> list[str]:
    """What happened among the experts while the run went on, in words. Raises FolderError if it cannot be read."""
    file = run / "manifest.json"
    with reading(file, "a manifest that cannot be read", "expected that of a finished run"):
        course = json.loads(file.read_text(encoding="utf-8")).get("course", []) if file.exists() else []
        changes = [(one["start"], one["change"]) for one in course if one["change"]]
    return [f"before batch {start}: {change}" for start, change in changes]


def write_diagnosis(run: Path, d: Diagnosis) -> None:
    """Write `diagnose.html` and `plots/diagnose-*.svg` into the run's folder."""
    import matplotlib as mpl

    drawn: dict[str, Callable[[Diagnosis], Figure]] = {
        "trust": scatter,
        "settings": by_setting,
        "quadrants": scattered,
        "entropies": sureness,
    }
    if d.coefficients:
        drawn["coefficients"] = histograms
    if d.drifts:
        drawn |= {"drift": depth, "angles": matrices}
    if d.paths:
        drawn["barriers"] = paths
    with mpl.rc_context({**STYLE, "font.size": 8}):
        plots = {name: as_svg(draw(d)) for name, draw in drawn.items()}
    (run / "plots").mkdir(exist_ok=True)
    for name, svg in plots.items():
        atomic_write(run / "plots" / f"diagnose-{name}.svg", svg)
    inline = {name: as_source(svg) for name, svg in plots.items()}
    effective = {name: {part: influence(rows).effective for part, rows in of.items()} for name, of in d.coefficients.items()}
    page = fill(
        "diagnose",
        {"percent": _percent, "signed": _signed},
        d=d,
        plots=inline,
        effective=effective,
        parts=PARTS,
        decided=d.decided.as_row(),
    )
    atomic_write(run / "diagnose.html", page)


def scatter(d: Diagnosis) -> Figure:
    """Entropy ratio against cross-entropy ratio, image by image: points on the rising diagonal are where entropy guides."""
    pairs = ratios(d.p, d.y)
    figure, panels = _panels(len(pairs), 3, 2.6)
    for axes, (pair, (a, b, split)) in zip(panels, pairs.items(), strict=False):
        step = max(1, len(a) // MOST)
        for name, shade in SHADE.items():
            own = split[::step] == name
            axes.plot(a[::step][own], b[::step][own], "o", ms=2, alpha=0.4, color=shade, label=name, mew=0, rasterized=True)
        axes.axhline(0.5, lw=0.5, color=QUIET)
        axes.axvline(0.5, lw=0.5, color=QUIET)
        axes.set_title(" / ".join(pair), loc="left")
        axes.set_xlabel("entropy ratio")
    panels[0].set_ylabel("cross-entropy ratio")
    panels[0].legend(frameon=False, markerscale=3, fontsize=7)
    return figure


def histograms(d: Diagnosis) -> Figure:
    """How often each expert got which weight."""
    rows = [(name, part) for name in d.coefficients for part in ("encoder", "head")]
    figure, panels = _panels(len(rows), 4, 1.7)
    bins = np.linspace(0, 1, 21)
    for axes, (name, part) in zip(panels, rows, strict=False):
        chosen = d.coefficients[name][part]
        for k in range(min(chosen.shape[1], len(d.p))):
            axes.hist(chosen[:, k], bins=bins.tolist(), histtype="step", color=PALETTE[k % len(PALETTE)], label=list(d.p)[k])
        axes.set_title(f"{name}: {part}", loc="left")
    panels[0].set_ylabel("batches")
    panels[0].legend(frameon=False, fontsize=6)
    return figure


def by_setting(d: Diagnosis) -> Figure:
    """How often images of each setting had which coefficient by entropy, and how far apart the two models were on them."""
    pairs = d.decided.pairs[:MOST_PAIRS]
    figure, panels = _panels(2 * len(pairs), 2, 2.0)
    bins = np.linspace(0, 1, 31)
    names = np.unique(d.decided.settings)
    drawn = [(one, what) for one in pairs for what in ("share", "apart")]
    for axes, (one, what) in zip(panels, drawn, strict=True):
        for k, name in enumerate(names):
            values = getattr(one, what)[d.decided.settings == name]
            weights = np.full(len(values), 1 / max(1, len(values)))
            style = "-" if k < len(PALETTE) else "--"
            axes.hist(
                values,
                bins=bins.tolist(),
                weights=weights,
                histtype="step",
                ls=style,
                color=PALETTE[k % len(PALETTE)],
                label=str(name),
            )
        said = "coefficient of the first by entropy" if what == "share" else "divergence / ln 2"
        axes.set_title(f"{' / '.join(one.pair)}: {said}", loc="left")
    panels[0].set_ylabel("share of the images")
    panels[0].legend(frameon=False, fontsize=6)
    return figure


def scattered(d: Diagnosis) -> Figure:
    """Every image by how unsure two models are and how far apart: which of them is right is its color."""
    pairs = d.decided.pairs[:MOST_PAIRS]
    figure, panels = _panels(len(pairs), 3, 2.6)
    shades = dict(zip(WHO, (QUIET, *PALETTE[:3]), strict=True))
    for axes, one in zip(panels, pairs, strict=False):
        step = max(1, len(one.apart) // MOST)
        for who, shade in shades.items():
            own = (one.right[::step, :2] == who).all(1)
            x, y, name = one.unsure[::step][own], one.apart[::step][own], f"{who[0]}{who[1]}"
            axes.plot(x, y, "o", ms=2, alpha=0.4, color=shade, label=name, mew=0, rasterized=True)
        axes.axvline(float(np.median(one.unsure)), lw=0.5, color=QUIET)
        axes.set_title(" / ".join(one.pair), loc="left")
        axes.set_xlabel("mean entropy / ln C")
    panels[0].set_ylabel("divergence / ln 2")
    panels[0].legend(frameon=False, markerscale=3, fontsize=7)
    return figure


def sureness(d: Diagnosis) -> Figure:
    """Mean entropy of every row's predictions: single models in gray."""
    rows = d.decided.entropies
    figure, (axes,) = _panels(1, 1, 0.3 + 0.17 * len(rows))
    at = range(len(rows))
    axes.barh(at, [row["entropy"] for row in rows], color=[QUIET if row["single"] else "#0072B2" for row in rows], height=0.7)
    axes.set_yticks(at, [row["row"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("mean entropy of predictions, nats (gray: single models)")
    return figure


def depth(d: Diagnosis) -> Figure:
    """Mean angle and what is left in the mean, block by block."""
    figure, (left, right) = _panels(2, 2, 2.8)
    for one, shade in zip(d.drifts or (), (QUIET, "#0072B2"), strict=True):
        name = "what was learned" if one.relative else "the weights"
        at = range(len(one.blocks))
        left.plot(at, one.mean_angle.tolist(), "o-", ms=3, color=shade, label=name)
        right.plot(at, one.attenuation.tolist(), "o-", ms=3, color=shade, label=f"{name}, measured")
        right.plot(at, one.predicted.tolist(), ":", lw=1, color=shade, label="from the mean angle")
        for axes in (left, right):
            axes.set_xticks(at, one.blocks, rotation=60, ha="right", fontsize=7)
    left.set_ylabel("mean angle between experts, degrees")
    right.set_ylabel("norm of the mean / mean of norms")
    right.legend(frameon=False, fontsize=7)
    left.legend(frameon=False, fontsize=7)
    return figure


def matrices(d: Diagnosis) -> Figure:
    """Angles of every pair: the whole encoder's blocks on the average, and the head, of what was learned."""
    assert d.drifts
    learned, names = d.drifts[1], list(d.p)
    figure, panels = _panels(2, 2, 2.8)
    for axes, (title, table) in zip(
        panels, (("encoder, mean over blocks", learned.angles[:-1].mean(0)), ("head", learned.angles[-1])), strict=True
    ):
        axes.imshow(table.numpy(), cmap="cividis", vmin=0, vmax=120)
        for (i, j), value in np.ndenumerate(table.numpy()):
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=ON_BRIGHT if value > 66 else ON_DIM)
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"{title}: degrees", loc="left")
    return figure


def paths(d: Diagnosis) -> Figure:
    """Cross-entropy along the line between two experts, when encoder, head or both move."""
    figure, panels = _panels(len(PARTS), 3, 2.6)
    pairs = list(dict.fromkeys(tuple(row["pair"]) for row in d.paths))
    for axes, part in zip(panels, PARTS, strict=True):
        for row in (row for row in d.paths if row["part"] == part):
            shade = PALETTE[pairs.index(tuple(row["pair"])) % len(PALETTE)]
            axes.plot(row["at"], row["cross_entropy"], color=shade, label=" / ".join(row["pair"]))
        axes.set_title(f"moves: {part}", loc="left")
        axes.set_xlabel("share of the first expert")
    panels[0].set_ylabel("cross-entropy, nats")
    panels[0].legend(frameon=False, fontsize=7)
    return figure


def _panels(count: int, columns: int, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(8.6, 0.3 + height * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for number, axes in enumerate(panels):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_visible(number < count)
    return figure, panels


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.2f}"
