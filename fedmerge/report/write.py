"""A run's folder: every file appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedmerge.report.page import render
from fedmerge.report.plots import draw
from fedmerge.report.record import RunRecord
from fedmerge.report.summary import predictions, summarise


def write(out: Path, record: RunRecord) -> dict[str, Any]:
    """Write `summary.json`, `predictions.npz`, `plots/` and `report.html` into `out`; returns the summary."""
    summary = summarise(record)
    _replace(out / "summary.json", json.dumps(summary, indent=2).encode())
    with (out / ".predictions.draft").open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **predictions(record))
    (out / ".predictions.draft").replace(out / "predictions.npz")
    (out / "plots").mkdir(exist_ok=True)
    plots = draw(record, summary)
    for name, svg in plots.items():
        _replace(out / "plots" / f"{name}.svg", svg.encode())
    _replace(out / "report.html", render(record, summary, plots).encode())
    return summary


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(content)
    draft.replace(path)
