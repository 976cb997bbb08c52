"""The page of a run that is still going on, from its folder alone: progress of hospitals, accuracy so far, and the coefficients.

It shows what the report will show, and no more, and reads nothing but `scenario.yaml`, `manifest.json`, `status.json` and
`batches.jsonl`. `watch_sweep.py` has the page of a sweep.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from fedmerge.errors import FolderError
from fedmerge.report.batch_log import Step
from fedmerge.report.pages._render import fill
from fedmerge.report.plots.layout import MOST_POINTS, largest
from fedmerge.report.plots.live import lines, river, shades
from fedmerge.report.records import ANCHORS
from fedmerge.report.terminal import duration
from fedmerge.system.files import reading
from fedmerge.system.process import free_lock

EXPECTED = "expected the folder of a run or of a sweep, e.g. runs/organs-0, as its command says it with --out"

SILENT_S = 10.0
"""A run that says it is running, and has written nothing for so long, is asked for: its process holds a lock."""

PARTS = ("encoder", "head")

FILTERS: dict[str, Callable[..., str]] = {
    "percent": lambda share: f"{100 * share:.1f}",
    "points": lambda share: f"{100 * share:+.1f}",
}
"""How the templates write numbers."""


@dataclass
class Course:
    """What one method did so far, in runs of batches (bins). shares: for encoder and head, the sum of coefficients by name."""

    right: Counter[int] = field(default_factory=Counter)
    seen: Counter[int] = field(default_factory=Counter)
    steps: Counter[int] = field(default_factory=Counter)
    shares: dict[str, dict[int, dict[str, float]]] = field(default_factory=lambda: {part: {} for part in PARTS})

    def add(self, place: int, step: Step, there: list[str]) -> None:
        """One step. there: names of the experts, in the order of coefficients."""
        self.right[place] += step.correct
        self.seen[place] += step.n
        self.steps[place] += 1
        for part, given in zip(PARTS, (step.encoder, step.head), strict=True):
            sums = self.shares[part].setdefault(place, {}) if given else {}
            names = [*there, *ANCHORS[: max(0, len(given or ()) - len(there))]]
            for name, share in zip(names, given or (), strict=False):
                sums[name] = sums.get(name, 0.0) + share

    def accuracy(self, last: int | None = None) -> float:
        """Over the last so many bins, or all."""
        places = sorted(self.seen)[-last:] if last else list(self.seen)
        return sum(self.right[p] for p in places) / max(1, sum(self.seen[p] for p in places))

    def moving(self, window: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bins, and the accuracy over each and those before it, `window` together."""
        places = sorted(self.seen)
        right, seen = (np.cumsum([0, *(of[p] for p in places)]) for of in (self.right, self.seen))
        first = np.maximum(np.arange(len(places)) - window + 1, 0)
        last = np.arange(len(places)) + 1
        return np.array(places, dtype=np.float64), (right[last] - right[first]) / np.maximum(1, seen[last] - seen[first])

    def coefficients(self, part: str) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str]] | None:
        """Bins (B,), mean coefficients (B, K) and names; None where the method has none."""
        rows = self.shares[part]
        if not rows:
            return None
        places = sorted(rows)
        names = list(dict.fromkeys(name for place in places for name in rows[place]))
        values = [[rows[place].get(name, 0.0) / self.steps[place] for name in names] for place in places]
        return np.array(places, dtype=np.float64), np.array(values), names


class Holder:
    """The process that writes into a folder, which holds the folder's lock. names: of the files that it writes.

    now: seconds since 1970.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], now: Callable[[], float]) -> None:
        self.lock, self.now = folder / ".lock", now
        self._files = [folder / name for name in names]
        self._asked, self._gone = -SILENT_S, False

    def gone(self) -> bool:
        """Whether nobody holds the lock. It is taken for a moment, and only where nothing was written for a while."""
        changed = max((file.stat().st_mtime for file in self._files if file.exists()), default=0.0)
        if self.now() - changed < SILENT_S:
            self._gone = False
        elif self.now() - self._asked >= SILENT_S:
            self._asked = self.now()
            self._gone = _is_free(self.lock)
        return self._gone


class Watched:
    """A run's folder, read again and again: of the growing file, only what is new. Raises FolderError if it holds no run.

    now: seconds since 1970.
    """

    def __init__(self, run: Path, now: Callable[[], float] = time.time) -> None:
        self.run, self.now = run, now
        self.result = run / "report.html"
        self._holder = Holder(run, ("manifest.json", "status.json", "batches.jsonl", "audit.jsonl"), now)
        self.rows: dict[str, Course] = {}
        self._read, self._of = 0, ""
        self._width = 1
        self.scenario: dict[str, Any] = {}
        self.manifest: dict[str, Any] = {}
        self.status: dict[str, Any] = {}
        _refuse_no_run(run)
        self.look()

    def look(self) -> None:
        """Read what is new. Raises FolderError if the run is no longer there, or cannot be read."""
        with reading(self.run, "what cannot be read as a run", EXPECTED):
            self.manifest = json.loads((self.run / "manifest.json").read_text(encoding="utf-8"))
            if self.manifest["started"] != self._of or not self.scenario:
                self.scenario = yaml.safe_load((self.run / "scenario.yaml").read_text(encoding="utf-8"))
            _ = self.manifest["scenario"], self.scenario["target"]["name"], [site["name"] for site in self.scenario["sites"]]
            self.status = told_in(self.run)
            self._follow()

    @property
    def batches(self) -> int:
        """Batches of the whole stream, or those there are where nobody has said how many there will be."""
        return int(self.stream.get("batches", 0)) or (1 + max((max(row.seen) for row in self.rows.values()), default=-1))

    @property
    def stream(self) -> dict[str, Any]:
        """What the run told of its stream as it began; nothing before."""
        found: dict[str, Any] = self.status.get("stream", {})
        return found

    @property
    def done(self) -> int:
        """Batches that are done: methods of experts that come later have fewer."""
        each = [sum(row.steps.values()) for row in self.rows.values()]
        return max(each, default=0)

    def state(self) -> str:
        """`running`, `done`, `failed`, or `cut off`: its process is gone without a word."""
        status = str(self.manifest.get("status", ""))
        return "cut off" if status == "running" and self._holder.gone() else status

    def _follow(self) -> None:
        """New lines of `batches.jsonl`; all of them again where a run was started anew or went on from an earlier point."""
        file, started = self.run / "batches.jsonl", str(self.manifest["started"])
        width = max(1, -(-int(self.stream.get("batches", 0)) // MOST_POINTS))
        try:
            size = file.stat().st_size
        except OSError:
            size = 0
        if started != self._of or size < self._read or width != self._width:
            self.rows, self._read, self._of, self._width = {}, 0, started, width
        if size <= self._read:
            return
        with file.open("rb") as opened:
            opened.seek(self._read)
            content = opened.read(size - self._read)
        whole = content[: content.rfind(b"\n") + 1]  # the last line may be half written
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                step = Step.parse(line.decode(), np.empty((0, 1), np.float32))
            except (ValueError, KeyError, TypeError):  # torn by a kill; the run does this batch again
                continue
            self.rows.setdefault(step.method, Course()).add(step.t // self._width, step, self._there(step.t))

    def _there(self, t: int) -> list[str]:
        course = self.stream.get("course") or self._course_of_manifest()
        there = [names for start, names in course if start <= t]
        return list(there[-1]) if there else [site["name"] for site in self.scenario["sites"]]

    def _course_of_manifest(self) -> list[list[Any]]:
        return [[one["start"], one["experts"]] for one in self.manifest.get("course", [])]

    @property
    def names(self) -> list[str]:
        """Rows of the table: those that the run told of, or else those that it has written."""
        return list(self.stream.get("methods", {})) or list(self.rows)

    def page(self, sweep: str = "") -> str:
        """The page as it is now. A browser asks for it again and again, and changes what is new. sweep: where its page is."""
        names = self.names
        return fill(
            "watch",
            FILTERS,
            w=self,
            sweep=sweep,
            state=self.state(),
            hospitals=self.hospitals(),
            left=self.left(),
            rows=[(name, self.rows[name], self.stream.get("methods", {}).get(name, {})) for name in names if name in self.rows],
            window=self.window,
            accuracy=self._accuracy_plot(names),
            colors=shades(names, [name for name in names if name.startswith("expert")]),
            rivers=self.rivers(),
            width=self.width,
            report=self.result.is_file() and self.manifest.get("status") == "done",
            phases=self.manifest.get("phases_seconds", {}),
            duration=duration,
        )

    @property
    def window(self) -> int:
        """Batches of a moving accuracy, as the report has it."""
        return max(3, self.batches // 12)

    @property
    def width(self) -> int:
        """Batches that stand together in a plot."""
        return self._width

    @property
    def bins(self) -> int:
        """The window, in runs of batches."""
        return max(1, self.window // self._width)

    def same_batches(self, name: str, other: str = "mean") -> bool:
        """Whether two methods have done the same batches, so that they can be compared."""
        return other in self.rows and self.rows[name].steps == self.rows[other].steps

    def hospitals(self) -> list[dict[str, Any]]:
        """Every hospital in the scenario's order: its title, a few words on what it does, and its share of that, or None."""
        told, absent = self.status.get("sites", {}), self.manifest.get("absent", {})
        trained, phase = self.manifest.get("trained", {}), self.status.get("phase", "")
        found = []
        for site in [*self.scenario["sites"], *self.scenario.get("joining", [])]:
            name = site["name"]
            own = told.get(name, {})
            share: float | None = own.get("share")
            text = str(own.get("text", "waits"))
            if name in absent:
                text, share = f"stays away: {absent[name]}", None
            elif own.get("phase") != phase and name in trained:
                before = "it brings its expert" if site.get("expert") else "its expert was in the pool"
                text, share = "its expert was trained in this run" if trained[name] else before, 1.0
            found.append({"name": name, "title": site.get("title", ""), "text": text, "share": share})
        return found

    def left(self) -> str:
        """How much time the phase will still take, in words; nothing where there is no telling."""
        gone = self.now() - float(self.status.get("since", self.now()))
        if self.stream:
            first = int(self.stream.get("done", 0))
            share = (self.done - first) / max(1, self.batches - first)
        else:
            phase = self.status.get("phase", "")
            shares = [one["share"] for one in self.status.get("sites", {}).values() if one["phase"] == phase]
            share = sum(shares) / max(1, len(shares))
        return f"about {duration(gone * (1 - share) / share)} left" if 0 < share < 1 and self.state() == "running" else ""

    def _accuracy_plot(self, names: list[str]) -> Any:
        drawn = {name: self.rows[name].moving(self.bins) for name in names if name in self.rows}
        of = {name: (self._width * at, y) for name, (at, y) in drawn.items()}
        return lines(of, self.batches, f"Moving accuracy of every method over {self.window} batches") if of else None

    def rivers(self) -> list[dict[str, Any]]:
        """The stream's true mix as far as it has gone, and below it the coefficients of every method that has some."""
        found, mix = [], self.stream.get("mix")
        if mix and self.done:
            at = np.array(mix["at"], dtype=np.float64)
            gone = at < self.done
            found.append(self._drawn("the stream's true mix", at[gone], np.array(mix["shares"])[gone], mix["names"]))
        for name in self.names:
            for part in PARTS if name in self.rows else ():
                if given := self.rows[name].coefficients(part):
                    at, shares, experts = given
                    found.append(self._drawn(f"{name}: {part}", self._width * at, shares, experts))
        return found

    def _drawn(self, title: str, at: NDArray[np.float64], whole: NDArray[np.float64], everyone: list[str]) -> dict[str, Any]:
        shares, names = largest(whole, everyone)
        latest = [(name, float(share), color) for (name, color), share in zip(shades(names).items(), shares[-1], strict=True)]
        return {"title": title, "svg": river(at, shares, names, self.batches, title), "latest": latest}


def script() -> bytes:
    """What the page runs: it asks for itself again, and shows what has changed."""
    return (resources.files("fedmerge.report.pages") / "templates" / "watch.js").read_bytes()


def told_in(folder: Path) -> dict[str, Any]:
    """What a run or a sweep says of itself; nothing of an older version, or one that could not write it."""
    try:
        told = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _refuse_no_run(run: Path) -> None:
    if not run.exists():
        raise FolderError(f"{run}: found nothing; {EXPECTED}. It is there as soon as the run begins")
    if not run.is_dir():
        raise FolderError(f"{run}: found a file; {EXPECTED}")
    if not (run / "manifest.json").is_file():
        raise FolderError(f"{run}: found no manifest.json in it; {EXPECTED}")


def _is_free(lock: Path) -> bool:
    try:
        taken = free_lock(lock) if lock.is_file() else None
    except OSError:  # another user's run: there is no telling
        return False
    if taken is not None:
        taken.release()
    return taken is not None or not lock.is_file()
