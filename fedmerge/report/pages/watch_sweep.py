"""The page of a sweep that is going on, from its folder alone: progress of every run, and the coefficients of one of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from fedmerge.errors import FolderError
from fedmerge.report.pages._render import fill
from fedmerge.report.pages.watch import EXPECTED, FILTERS, Holder, Watched, told_in
from fedmerge.report.terminal import duration

CELLS = "cells"
"""The folder of a sweep's runs."""


def is_sweep(folder: Path) -> bool:
    """Whether a sweep writes here, or wrote here: a run has a manifest of its own."""
    return not (folder / "manifest.json").exists() and (told_in(folder).get("cells") is not None or (folder / CELLS).is_dir())


class WatchedSweep:
    """A sweep's folder, read again and again. Raises FolderError if it holds no sweep.

    now: seconds since 1970.
    """

    def __init__(self, run: Path, now: Callable[[], float] = time.time) -> None:
        self.run, self.now = run, now
        self.result = run / "sweep.html"
        self.status: dict[str, Any] = {}
        self.cells: list[dict[str, Any]] = []
        self._holder = Holder(run, ("status.json",), now)
        self._runs: dict[str, Watched] = {}
        self.look()

    def look(self) -> None:
        """Read what is new. Raises FolderError if the sweep is no longer there."""
        self.status = told_in(self.run)
        names = self.status.get("cells") or sorted(cell.parent.name for cell in self.run.glob(f"{CELLS}/*/manifest.json"))
        if not names:
            raise FolderError(f"{self.run}: found no run of a sweep in it; {EXPECTED}")
        self.cells = [self._cell(name) for name in names]

    def of(self, name: str) -> Watched | None:
        """One of the runs as it is now; None if none of this name has begun. Raises FolderError if it cannot be read."""
        return self._opened(name) if any(cell["name"] == name and cell["there"] for cell in self.cells) else None

    def state(self) -> str:
        """`running`, `done`, `failed`, or `cut off`: its process is gone without a word."""
        told = str(self.status.get("state", ""))
        if not told:  # an older version says nothing of itself
            told = "running" if any(cell["state"] == "running" for cell in self.cells) else "done"
        elif told == "running" and self._holder.gone():
            return "cut off"
        return told

    def left(self) -> str:
        """How much time the sweep will still take, in words; nothing where there is no telling."""
        shares = [cell["share"] or 0.0 for cell in self.cells if cell["name"] in self.status.get("left", ())]
        share = sum(shares) / max(1, len(shares))
        gone = self.now() - float(self.status.get("since", self.now()))
        return f"about {duration(gone * (1 - share) / share)} left" if 0 < share < 1 and self.state() == "running" else ""

    def page(self) -> str:
        """The page as it is now."""
        going = [cell["name"] for cell in self.cells if cell["state"] == "running"]
        shown = self._runs[going[0]] if going else None
        return fill(
            "watch_sweep",
            FILTERS,
            w=self,
            title=self.status.get("sweep", self.run.name),
            state=self.state(),
            cells=self.cells,
            counts=Counter(cell["state"] for cell in self.cells),
            left=self.left(),
            result=self.result.is_file(),
            shown=shown,
            rivers=shown.rivers() if shown else [],
            width=shown.width if shown else 1,
        )

    def _cell(self, name: str) -> dict[str, Any]:
        """What one run is at. there: whether it has a page. share: of its stream; None before it."""
        failed = self.status.get("failed", {}).get(name)
        told = {"name": name, "there": False, "share": None, "state": "waits", "text": "waits"}
        if failed:
            told |= {"state": "failed", "text": f"failed: {failed}"}
        folder = self.run / CELLS / name
        if not (folder / "manifest.json").is_file():
            return told
        try:
            run = self._opened(name)
        except FolderError as error:
            return {**told, "state": "failed", "text": str(error)}
        told["there"] = True
        state, again = run.state(), name in self.status.get("left", ()) and self._before(run.manifest["started"])
        if failed or again:  # what an earlier sweep left, and this one has not come to
            return told
        if state == "done" and not (folder / "summary.json").is_file():  # it has trained the experts of several
            return {**told, "text": "waits; its experts are in the pool"}
        where = f"batch {run.done} of {run.batches}" if run.stream else str(run.status.get("phase", "it begins"))
        texts = {"done": "done", "running": where, "failed": f"failed: {run.manifest.get('reason', 'without a word')}"}
        share = 1.0 if state == "done" else run.done / max(1, run.batches) if run.stream else 0.0
        return {**told, "state": state, "share": share, "text": texts.get(state, f"{state}: {where}")}

    def _opened(self, name: str) -> Watched:
        """Raises FolderError if it cannot be read."""
        if name in self._runs:
            self._runs[name].look()
        else:
            self._runs[name] = Watched(self.run / CELLS / name, self.now)
        return self._runs[name]

    def _before(self, started: str) -> bool:
        """Whether a run began before this sweep. It is written in whole seconds."""
        return datetime.fromisoformat(started).timestamp() < int(float(self.status.get("began", 0)))
