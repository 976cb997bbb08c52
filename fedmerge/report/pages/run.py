"""`report.html`: one self-contained page.

A run's folder: every file appears whole or not at all.
"""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.report.metrics.disagreement import vote_entropy, votes
from fedmerge.report.pages._render import fill
from fedmerge.report.plots.run import draw
from fedmerge.report.plots.svg import as_source
from fedmerge.report.records import RunRecord
from fedmerge.report.summary import REFERENCE, predictions, summarize
from fedmerge.report.terminal import in_short, p_value
from fedmerge.system.files import atomic, atomic_write

PIXELS = 96
"""Side of a sample image on the page; small images are enlarged without smoothing."""


MOST_SEGMENTS = 12
"""Segments that a table can show; a stream that changes with every batch has none worth the name."""

FEW = 3
"""Adaptive methods that get a sentence each below the lead; more are listed."""


def render(record: RunRecord, summary: dict[str, Any], plots: dict[str, str]) -> str:
    """The page as text; every image is inside it."""
    rows = sorted(summary["methods"].items(), key=lambda item: (not item[1]["ranked"], -item[1]["accuracy"]))
    changes = rows[0][1]["segments"]
    adaptive = [name for name in record.methods if record.steps_of(name)[0].encoder is not None]
    return fill(
        "page",
        {"percent": _percent, "size": _size, "p": p_value, "points": _points},
        r=record,
        s=summary,
        rows=rows,
        lead=" ".join(in_short(summary)),
        verdicts=" ".join(verdicts(record, summary)),
        confused=confusions(record, summary),
        plots={name: as_source(svg) for name, svg in plots.items()},
        adaptive=adaptive,
        changes=changes if 1 < len(changes) <= MOST_SEGMENTS else [],
        closed=any(row["gap_closed"] is not None for _, row in rows),
        remarks=[(name, row["remark"]) for name, row in rows if row["remark"]],
        precomputed=any(row["forwards_after_first_pass"] for _, row in rows),
        leaves=leaves(record),
        galleries=galleries(record),
        apart=disputed_images(record, [name for name, row in rows if row["ranked"]]),
        vetting=record.manifest.get("vetting"),
        costed=[(name, row) for name, row in rows if "cost" in row],
    )


def verdicts(record: RunRecord, summary: dict[str, Any]) -> list[str]:
    """What the lead leaves out: how each other adaptive method stands against the mean, and the commonest class if it is better."""
    ranked = {name: row for name, row in summary["methods"].items() if row["ranked"]}
    if not ranked:
        return ["No row is ranked: none covers the whole stream without seeing more than a hospital could."]
    best = max(ranked, key=lambda name: ranked[name]["accuracy"])
    said = []
    versus = {name: row["vs_mean"] for name, row in ranked.items() if record.methods[name].kind == "adaptive" and row["vs_mean"]}
    versus.pop(best, None)
    for name, found in versus.items() if len(versus) <= FEW else ():
        low, high = found["ci95"]
        points = f"({_points(found['difference'])} points, 95% interval {_points(low)} to {_points(high)})"
        said.append(f"{name} {_verdict(found)} {points}.")
    for verdict in ("beats the mean", "is not told apart from the mean", "loses to the mean") if len(versus) > FEW else ():
        names = [f"{name} ({_points(found['difference'])})" for name, found in versus.items() if _verdict(found) == verdict]
        if names:
            said.append(f"What {verdict}, with the difference in points: {', '.join(names)}.")
    always = summary["majority_class"]
    if always["accuracy"] >= ranked[best]["accuracy"]:
        alone = f"The commonest class alone, {always['class']}, is right for {_percent(always['accuracy'])}%"
        said.append(f"{alone}: no ranked method is better.")
    return said


MOST_CLASSES = 12
"""Classes of a matrix that can be read; of more, the commonest mistakes are listed."""

MISTAKES = 10
"""Kinds of mistakes in that list."""


def confusions(record: RunRecord, summary: dict[str, Any]) -> dict[str, Any] | None:
    """For which class which is taken, by the best ranked method and by the mean merge; None where there is nothing to compare.

    counts, mean: images, (C, C) lists, true class by row. mistakes: (true, taken for, by the method, by the mean), commonest first.
    """
    ranked = {name: row for name, row in summary["methods"].items() if row["ranked"]}
    others = {name: row for name, row in ranked.items() if name != REFERENCE}
    if REFERENCE not in ranked or not others:
        return None
    best = max(others, key=lambda name: others[name]["accuracy"])
    y, C = np.concatenate(record.labels), len(record.classes)

    def counted(method: str) -> list[list[int]]:
        pairs = y * C + record.probabilities(method).argmax(1)
        matrix: list[list[int]] = np.bincount(pairs, minlength=C * C).reshape(C, C).tolist()
        return matrix

    counts, mean = counted(best), counted(REFERENCE)
    wrong = [(i, j) for i in range(C) for j in range(C) if i != j and (counts[i][j] or mean[i][j])]
    wrong.sort(key=lambda pair: -max(counts[pair[0]][pair[1]], mean[pair[0]][pair[1]]))
    names = record.classes
    mistakes = [(names[i], names[j], counts[i][j], mean[i][j]) for i, j in wrong[:MISTAKES]]
    return {"method": best, "counts": counts, "mean": mean, "mistakes": mistakes, "matrix": C <= MOST_CLASSES}


def disputed_images(record: RunRecord, ranked: list[str]) -> dict[str, Any]:
    """On how many images ranked methods, without single experts, disagree; and those that the target shows.

    shown: for each, its picture, place, batch, true class, and for every class that somebody says: the class, who says it, and
    whether it is right.
    """
    names, said = votes(ranked, record.stream.samples, record.probabilities)
    y, sizes = np.concatenate(record.labels), [len(batch) for batch in record.labels]
    batch = np.repeat(np.arange(len(sizes)), sizes)
    shown = []
    for place, image in zip(record.disputed.places, record.disputed.images, strict=True) if record.disputed else ():
        of = {
            record.classes[c]: [name for name, vote in zip(names, said[:, place], strict=True) if vote == c] for c in said[:, place]
        }
        true = record.classes[y[place]]
        answers = [(answer, who, answer == true) for answer, who in of.items()]
        shown.append({"image": _png(image), "place": place, "batch": int(batch[place]), "true": true, "answers": answers})
    return {"methods": names, "count": int((vote_entropy(said) > 0).sum()), "shown": shown}


def _verdict(versus: dict[str, Any]) -> str:
    low, high = versus["ci95"]
    return "beats the mean" if low > 0 else "loses to the mean" if high < 0 else "is not told apart from the mean"


def leaves(record: RunRecord) -> list[dict[str, Any]]:
    """What left every site: totals by kind, and every item."""
    found, of_site = [], defaultdict(list)
    for item in record.audit:
        of_site[item["site"]].append(item)
    for name in [*(site.name for site in record.sites), record.target]:
        items = of_site[name]
        if name == record.target and not items:
            continue
        kinds = sorted({item["kind"] for item in items})
        totals = {kind: sum(item["bytes"] for item in items if item["kind"] == kind) for kind in kinds}
        found.append({"site": name, "items": items, "totals": totals, "bytes": sum(totals.values())})
    return found


def galleries(record: RunRecord) -> list[dict[str, Any]]:
    """Sample images of every site and of the target that agree to show some."""
    shown = [(site.name, site.title, site.samples) for site in record.sites]
    shown.append((record.target, record.target_title or "the target", record.target_samples))
    return [
        {"name": name, "title": title, "images": [_png(image) for image in samples] if samples is not None else []}
        for name, title, samples in shown
    ]


def _png(image: NDArray[np.uint8]) -> str:
    from PIL import Image

    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    file = io.BytesIO()
    picture.resize((PIXELS, PIXELS), Image.Resampling.NEAREST).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def write(out: Path, record: RunRecord) -> dict[str, Any]:
    """Write `summary.json`, `predictions.npz`, `plots/` and `report.html` into `out`; returns the summary."""
    summary = summarize(record)
    atomic_write(out / "summary.json", json.dumps(summary, indent=2))
    with atomic(out / "predictions.npz") as draft, draft.open("wb") as opened:
        np.savez_compressed(opened, allow_pickle=False, **predictions(record))
    (out / "plots").mkdir(exist_ok=True)
    plots = draw(record, summary)
    for name, svg in plots.items():
        atomic_write(out / "plots" / f"{name}.svg", svg)
    atomic_write(out / "report.html", render(record, summary, plots))
    return summary
