"""Memory of a run's processes along its way, read from /proc (Linux): the driver, the target's actor, Ray's daemons, clients."""

from __future__ import annotations

import csv
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

KINDS = ("RssAnon", "RssFile", "RssShmem")
"""Pages of a process's own, of files (dropped when memory is short), and of memory shared with others (Ray's object store)."""

ACTORS = ("ray::Host", "ray::Placed")
"""What the target's process may be called."""

SERVER = "fedmerge.federated.flower.simulation"
"""The process that the federation's server runs in, with Flower's own part."""


@dataclass(frozen=True)
class Sample:
    """At one moment: batches done, MiB by role and kind, and the sum over all processes, with shared pages counted once."""

    seconds: float
    position: int
    of: dict[tuple[str, str], float]
    total: float
    processes: int


@dataclass
class Watched:
    """A command that has ended, and what was seen while it ran."""

    returncode: int
    seconds: float
    said: str
    samples: list[Sample] = field(default_factory=list)

    def peak(self, role: str, kind: str) -> float:
        """MiB."""
        return max((sample.of.get((role, kind), 0.0) for sample in self.samples), default=0.0)

    def slope(self, role: str, kind: str, batches: int) -> tuple[float, float]:
        """Bytes per batch and standard error: a line through means over 20 stretches of the stream, the first tenth left out."""
        from scipy.stats import linregress

        seen = [
            (s.position, s.of[role, kind]) for s in self.samples if (role, kind) in s.of and 0.1 * batches <= s.position < batches
        ]
        at, mib = np.array(seen, dtype=float).T
        edges = np.linspace(0.1 * batches, batches, 21)
        parts = [(at >= a) & (at < b) for a, b in pairwise(edges)]
        means = np.array([(at[part].mean(), mib[part].mean()) for part in parts if part.any()])
        line = linregress(means[:, 0], means[:, 1] * 2**20)
        return float(line.slope), float(line.stderr)

    def write(self, file: Path) -> None:
        """All samples as CSV."""
        columns = sorted({key for sample in self.samples for key in sample.of})
        with file.open("w", encoding="utf-8", newline="") as out:
            lines = csv.writer(out, lineterminator="\n")
            lines.writerow(["seconds", "batches", "processes", "total MiB", *[f"{role} {kind} MiB" for role, kind in columns]])
            for one in self.samples:
                row = [f"{one.of.get(key, 0):.1f}" for key in columns]
                lines.writerow([f"{one.seconds:.1f}", one.position, one.processes, f"{one.total:.1f}", *row])


def watch(command: list[str], cwd: Path, run: Path, every_s: float, deadline_s: float) -> Watched:
    """Run a command and look at its processes until it ends. run: its run folder, where the number of batches is read."""
    began = time.monotonic()
    samples = []
    with tempfile.TemporaryFile("w+") as told:  # a pipe that nobody reads fills up, and the command waits
        child = subprocess.Popen(command, cwd=cwd, stdout=told, stderr=subprocess.STDOUT)
        while child.poll() is None and time.monotonic() - began < deadline_s:
            samples.append(look(child.pid, run, time.monotonic() - began))
            with suppress(subprocess.TimeoutExpired):
                child.wait(every_s)
        if child.poll() is None:
            child.terminate()
        child.wait(60)
        told.seek(0)
        said = told.read()
    return Watched(child.returncode, time.monotonic() - began, said, samples)


def look(root: int, run: Path, seconds: float) -> Sample:
    """One sample of a process and all that descend from it."""
    of: dict[tuple[str, str], float] = {}
    total, family = 0.0, descendants(root)
    for pid in family:
        with suppress(OSError, ValueError, KeyError):  # it has ended meanwhile
            role = role_of(pid, root)
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            for kind in KINDS:
                of[role, kind] = of.get((role, kind), 0.0) + int(status[kind].split()[0]) / 1024
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
    done = [int(file.stem) for file in run.glob("progress/*.npz")]
    return Sample(seconds, max(done, default=0), of, total, len(family))


def role_of(pid: int, root: int) -> str:
    """Whose process it is."""
    if pid == root:
        return "driver"
    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    if any(name in command for name in ACTORS):
        return "target"
    if SERVER in command:
        return "server"
    return "clients" if "ray::" in command or "fedmerge" in command else "daemons"


def descendants(root: int) -> list[int]:
    """A process and everything it has started."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                stat = (folder / "stat").read_text()
                parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(folder.name))
    found = [root]
    for pid in found:
        found += parents.get(pid, [])
    return found
