"""What a person sees while a run goes on: phases, progress of every site, running accuracy, and the table at the end.

The picture of a scenario before it runs, for the terminal.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedmerge.errors import first_of
from fedmerge.report.batch_log import Step
from fedmerge.system.status_file import StatusFile

QUARTERS = 4
MOST_NAMED = 4
"""Sites that a line of progress names."""

MOST_LISTED = 24
"""Sites that a title names."""

PLAIN_WIDTH = 120
"""Characters of a line where there is no terminal to ask."""


MINUTE_S = 60.0
"""Without a terminal, at least so much time lies between two lines of a long wait."""


class Pace:
    """How far a long wait is, in words, and whether it is time to say so. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.began = self.told = clock()
        self.first: float | None = None

    def due(self) -> bool:
        """Whether a minute has gone since the last time; begins the next one then."""
        now = self.clock()
        if now - self.told < MINUTE_S:
            return False
        self.told = now
        return True

    def words(self, share: float) -> str:
        """share: of the whole that is done, in [0, 1]; what was done before the first call, as by an earlier run, took no time."""
        self.first = share if self.first is None else min(self.first, share)
        gone, done = self.clock() - self.began, share - self.first
        left = f"about {duration(gone * (1 - share) / done)} left" if done > 0 else "too early to tell how long"
        return f"{100 * share:.0f}%, {left}"


class Terminal:
    """Live where there is a terminal, a few plain lines where there is none, and nothing if `quiet`.

    Without a terminal, a long wait has a line at each quarter, and one a minute that tells how much time is left. clock: seconds.
    status: a file with the same progress, for `fedmerge watch`, quiet or not.
    """

    def __init__(self, quiet: bool = False, clock: Callable[[], float] = time.monotonic, status: Path | None = None) -> None:
        self.clock = clock
        self.status = StatusFile(status)
        self.console = _LastingConsole(status and status.parent, quiet)
        self.live = self.console.is_terminal and not quiet
        self._told: dict[str, int] = {}

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    def table(self, title: str, header: Sequence[str], *rows: Sequence[str]) -> None:
        """Names to the left of numbers."""
        shown = Table(title=title)
        for name in header:
            shown.add_column(Text(name), justify="left" if name == "method" else "right")
        for row in rows:
            shown.add_row(*map(Text, row))
        self.console.print(shown)

    def experts(self, sha256: dict[str, str], trained: dict[str, bool], brought: Sequence[str] = ()) -> None:
        """One line: every expert's digest, and whether it was trained now, lay in the pool, or was trained elsewhere."""
        how = {name: "trained now" if now else "brought" if name in brought else "from the pool" for name, now in trained.items()}
        self.say(f"experts: {first_of([f'{name} {digest[:12]} ({how[name]})' for name, digest in sha256.items()], MOST_LISTED)}")

    @contextmanager
    def progress(self, title: str, expected: int = 0) -> Iterator[SiteProgress]:
        """A block of progress bars, one for each site that reports. expected: sites, where those that still wait count, too."""
        self.say(title)
        self.status.put(phase=title, since=time.time())
        bars = SiteProgress(self, expected)
        if not self.live:
            yield bars
            return
        with bars.bars:
            yield bars

    @contextmanager
    def stream(self, batches: int, methods: list[str]) -> Iterator[StreamProgress]:
        """Progress of the stream above a table of running accuracies."""
        shown = StreamProgress(self, batches, methods)
        if not self.live:
            yield shown
            return
        with Live(shown.render(), console=self.console, refresh_per_second=4, transient=True) as live:
            shown.live = live
            yield shown

    def summary(self, summary: dict[str, Any]) -> None:
        """The final table: accuracy with its interval, the difference to the mean, and the commonest class alone."""
        over = f"{summary['intervals']['count']} {summary['intervals']['over']}"
        table = Table(title=f"{summary['scenario']}, seed {summary['seed']} (one seed; 95% intervals over {over})")
        table.add_column("method", no_wrap=True)
        for name in ("accuracy", "95% interval", "against the mean", "balanced", "NLL", "forwards"):
            table.add_column(name, justify="right")
        for name, row in sorted(summary["methods"].items(), key=lambda item: (not item[1]["ranked"], -item[1]["accuracy"])):
            low, high = row["ci95"]
            versus = row["vs_mean"]
            gain = f"{100 * versus['difference']:+.1f} (p {p_value(versus['p'])})" if versus else ""
            cells = [f"{100 * row['accuracy']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}", gain]
            part = ", ".join(f"{a}-{b}" for a, b in row["covers"] or [])
            marked = f"{name} (batches {part})" if part else name if row["ranked"] else f"{name} (not ranked)"
            cells += [f"{100 * row['balanced_accuracy']:.1f}", f"{row['nll']:.2f}", f"{row['forwards_per_batch']:g}"]
            table.add_row(marked, *cells)
        always = summary["majority_class"]
        table.add_section()
        said = f"majority class, {always['class']}"
        table.add_row(said, f"{100 * always['accuracy']:.1f}", "", "", f"{100 * always['balanced_accuracy']:.1f}", "", "")
        self.console.print(table)
        for name, row in summary["methods"].items() if "classes" in summary else ():
            each = [
                f"{kind} {100 * row['by_novelty'][kind]['accuracy']:.1f}" for kind in ("base", "novel") if kind in row["by_novelty"]
            ]
            self.say(f"  {name}: of the images of each kind of class, right: {', '.join(each)}")
        for name, row in summary["methods"].items() if "tasks" in summary else ():
            each = [f"{task} {100 * one['accuracy']:.1f}" for task, one in row["by_task"].items()]
            self.say(f"  {name}: of the images of each task, right: {', '.join(each)}")
        for sentence in in_short(summary):
            self.say(sentence)

    def quarter(self, key: str, done: int, total: int, text: str) -> None:
        """Without a terminal: a line at each quarter, and no more."""
        reached = QUARTERS * done // max(total, 1)
        if reached < self._told.get(key, 0):  # the same site with its next task
            self._told[key] = reached
        if reached > self._told.get(key, 0):
            self._told[key] = reached
            self.say(f"  {key}: {text} ({100 * done // max(total, 1)}%)")


class SiteProgress:
    """Bars by site. expected: how many sites there will be, if that is known."""

    def __init__(self, terminal: Terminal, expected: int = 0) -> None:
        self.terminal, self.expected = terminal, expected
        self.pace = Pace(terminal.clock)
        self.shares: dict[str, float] = {}
        self.bars = Progress(
            TextColumn("  {task.fields[site]:<12}", markup=False),
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=terminal.console,
        )
        self._tasks: dict[str, TaskID] = {}

    def tick(self, site: str, done: int, total: int, text: str) -> None:
        """Steps done of all, and a few words."""
        told = {"share": done / max(total, 1), "text": text, "phase": self.terminal.status.facts.get("phase", "")}
        self.terminal.status.put_below("sites", site, told, now=done >= total)
        if not self.terminal.live:
            self.terminal.quarter(site, done, total, text)
            self._told(site, done / max(total, 1))
            return
        if site not in self._tasks:
            self._tasks[site] = self.bars.add_task(text, total=total, site=site)
        self.bars.update(self._tasks[site], completed=done, description=text)

    def _told(self, site: str, share: float) -> None:
        """One line a minute for all sites together, which names those that are at it."""
        self.shares[site] = share
        whole = sum(self.shares.values()) / max(len(self.shares), self.expected)
        words = self.pace.words(whole)
        if self.pace.due():
            busy = [f"{name} {100 * part:.0f}%" for name, part in self.shares.items() if part < 1]
            self.terminal.say(f"  {words}{': ' if busy else ''}{first_of(busy, MOST_NAMED)}")


class StreamProgress:
    """Running accuracy of every method."""

    def __init__(self, terminal: Terminal, batches: int, methods: list[str]) -> None:
        self.terminal, self.batches = terminal, batches
        self.right = dict.fromkeys(methods, 0)
        self.seen = dict.fromkeys(methods, 0)
        self.done = 0
        self.live: Live | None = None
        self.pace = Pace(terminal.clock)

    def add(self, steps: Iterable[Step]) -> None:
        """The steps of some batches."""
        for step in steps:
            self.right[step.method] += step.correct
            self.seen[step.method] += step.n
            self.done = max(self.done, step.t + 1)
        if self.live:
            self.live.update(self.render())
        else:
            self.terminal.quarter("stream", self.done, self.batches, f"batch {self.done}/{self.batches}")
            words = self.pace.words(self.done / max(self.batches, 1))
            if self.pace.due():
                self.terminal.say(f"  stream: {words}: batch {self.done} of {self.batches}")

    def render(self) -> Group:
        """The stream's position and the table."""
        table = Table(box=None, padding=(0, 2))
        table.add_column("method")
        table.add_column("running accuracy", justify="right")
        for method, seen in self.seen.items():
            table.add_row(method, f"{100 * self.right[method] / seen:.1f}" if seen else "")
        return Group(f"  batch {self.done} of {self.batches}", table)


def in_short(summary: dict[str, Any]) -> list[str]:
    """Two sentences: which method is best, how sure that is, against what and at which cost; and on which images it fails most."""
    ranked = {name: row for name, row in summary["methods"].items() if row["ranked"]}
    if not ranked:
        return []
    best = max(ranked, key=lambda name: ranked[name]["accuracy"])
    row, versus = ranked[best], ranked[best]["vs_mean"]
    low, high = row["ci95"]
    said = f"{best} is right for {100 * row['accuracy']:.1f}% of {summary['stream']['samples']} images"
    said += f" (95% interval {100 * low:.1f} to {100 * high:.1f})"
    if versus:
        low, high = versus["ci95"]
        said += f", {100 * versus['difference']:+.1f} points against the mean ({100 * low:+.1f} to {100 * high:+.1f})"
    said += f", at {row['forwards_per_batch']:g} forward{'s' * (row['forwards_per_batch'] != 1)} per batch."
    parts = []
    for what, key in (("domain", "per_domain"), ("class", "per_class")):
        if len(found := row[key]) > 1 and min(found.values()) < 1:
            worst = min(found, key=lambda name: found[name])
            parts.append(f"the {what} '{worst}' ({100 * found[worst]:.1f}%)")
    return [said, f"It fails most for {' and for '.join(parts)}."] if parts else [said]


def p_value(p: float) -> str:
    """Two digits, or a bound."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def shown_path(path: Path) -> str:
    """A path as short as it can be typed from here."""
    absolute = path.resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)


SHADES = " ░▒▓█"
COLUMNS = 60


def site_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """One row for each site, with the keys of the first as columns."""
    table = Table(title="sites")
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if number in (0, len(rows[0]) - 1) else "right")
    for row in rows:
        table.add_row(*row.values())
    return table


def stripes(names: Sequence[str], shares: NDArray[np.float64], columns: int = COLUMNS) -> list[str]:
    """One line for each name: its share over time, from blank to full. shares: (T, len(names)), in [0, 1]."""
    count = min(columns, len(shares))
    parts = np.array_split(shares, count)
    means = np.stack([part.mean(0) for part in parts])
    width = max(len(name) for name in names)
    lines = []
    for column, name in enumerate(names):
        levels = np.ceil(means[:, column] * (len(SHADES) - 1) - 1e-9).astype(int)
        lines.append(f"{name:>{width}} |{''.join(SHADES[level] for level in levels)}|")
    return lines


def histogram(counts: Mapping[str, int]) -> str:
    """Counts of classes as bars of eighths, in label order: ▁ is few, █ the most frequent, a dot is none."""
    most = max([*counts.values(), 1])
    return "".join("·" if count == 0 else "▁▂▃▄▅▆▇█"[min(7, int(8 * count / most))] for count in counts.values())


def duration(seconds: float) -> str:
    """Rounded to what an estimate is worth."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def console(quiet: bool = False, width: int = PLAIN_WIDTH) -> Console:
    """Plain, and this wide where there is no terminal."""
    found = Console(quiet=quiet, highlight=False, markup=False)
    _widen(found, width)
    return found


def _widen(found: Console, width: int) -> None:
    if not found.is_terminal:
        found.width = width


class _LastingConsole(Console):
    """Falls silent where standard output ends before the work, as after `| head`, and where a terminal is gone or a disk is full.

    That is told once, where errors go. watched: the folder that `fedmerge watch` shows, if there is one.
    """

    def __init__(self, watched: Path | None, quiet: bool) -> None:
        super().__init__(quiet=quiet, highlight=False, markup=False)
        _widen(self, PLAIN_WIDTH)
        self.watched = watched

    def on_broken_pipe(self) -> None:
        """rich would end the process."""
        self._fall_silent(os.strerror(errno.EPIPE))

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            self._fall_silent(error.strerror or str(error))

    def _fall_silent(self, why: str) -> None:
        self.quiet = True
        with suppress(OSError, ValueError):  # no file of the system's, as in a notebook
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, sys.stdout.fileno())  # for what it still holds
            os.close(nothing)
        seen = f", and is seen by: fedmerge watch {shown_path(self.watched)}" if self.watched else ""
        with suppress(OSError):
            print(f"fedmerge: standard output cannot be written ({why}); the work goes on{seen}", file=sys.stderr)
