"""Break a run at random moments, let it go on, and compare every prediction with those of a run that nobody disturbed.

    python benchmarks/faults.py --out runs/faults --page docs/faults.md

Three hospitals of the phantom, a tiny model, a stream in which one hospital joins and one leaves. Broken with SIGKILL: the driver
(the process of the command, while it trains or streams; then `--resume`), the target's actor (nothing is done: it must come back by
itself), and hospitals' clients while they train. Moments are drawn from `--seed`: for the driver in turn a share of the time that
an undisturbed run takes and one of the next batches, for the actor a batch and a delay, for a client a share of the time that
training takes. A run is broken several times before it may end. After every kill of the driver, what it had started is looked for.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from watch import ACTORS

ROOT = Path(__file__).resolve().parents[1]
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
PLANES = {"north": ["axial"], "south": ["coronal"], "east": ["sagittal"], "mercy": ["axial", "coronal"]}
SCENARIO: dict[str, Any] = {
    "name": "faults",
    "seed": 3,
    "model": {"name": "vit_tiny_patch16_224", "kwargs": TINY},
    "initialization": {"kind": "proxy", "source": {"kind": "organ_phantom", "images": 60, "patients": 12}, "epochs": 1},
    "sites": ["north", "south"],
    "training": {"runs": 2, "epochs": 3, "optimizer": "adamw", "retries": 5},
    "target": "mercy",
    "stream": {"kind": "mixture_drift", "batch_size": 8},
    "methods": ["mean", {"eam": {"gamma": 5}}, "adamerging", {"dawin": {"scope": "prefix"}}, "expert"],
    "events": [{"at": 15, "join": "east"}, {"at": 30, "leave": "north"}],
    "target_restarts": 100,
    "per_sample": "rows",
}
KILLS_A_RUN = 5
AHEAD = 12
"""Batches within which the driver is killed where a batch is drawn; there are about 50."""

GRACE_S = 60.0
"""Longest that something started by a killed driver may live on before it counts as left over, seconds."""


@dataclass
class Tally:
    """What was broken and how it ended. lost: batches that were missing, twice, or not the same bits. left: processes that
    outlived a killed driver by more than GRACE_S. gone_s: when the last of them had ended."""

    what: str
    kills: int = 0
    moments: list[str] = field(default_factory=list)
    runs: int = 0
    same: int = 0
    lost: int = 0
    left: int = 0
    recovery_s: list[float] = field(default_factory=list)
    gone_s: list[float] = field(default_factory=list)

    def bury(self, started: dict[int, str]) -> None:
        """Wait until all that a killed process had started is gone."""
        began = time.monotonic()
        self.left += left_over(started)
        self.gone_s.append(time.monotonic() - began)

    def row(self) -> str:
        """One line of the table."""
        recovery, gone = _seconds(self.recovery_s), _seconds(self.gone_s)
        counted = f"{self.kills} | {self.runs} | {self.same} | {self.lost} | {self.left} | {gone}"
        return f"| {self.what} | {counted} | {recovery} |"


def _seconds(found: list[float]) -> str:
    return f"{np.median(found):.0f} s (at most {max(found):.0f})" if found else ""


EXPLAINED = """\
# What happens when things break

This page shows that a run whose processes are killed ends with the same bits as an undisturbed run. `python
benchmarks/faults.py --page docs/faults.md` writes the table. The run has a tiny model, hospitals of the phantom, a stream of 8
images a batch in which one hospital joins and one leaves, and methods with a memory (`per_sample: rows`, since the ways of
merging for each image differ in the last bits). Each process is killed with SIGKILL at a random moment. A killed driver is
started again with `--resume`; after the death of the target's actor or of a client nothing is done.

| column | means |
|---|---|
| kills, runs | number of kills, and of the runs in which they happened |
| identical at the end | runs in which every prediction of every batch and method has the same bits as in the undisturbed run, \
and every batch is counted once; while hospitals train: every expert has the same sha256 |
| left running | processes started by a killed driver that had not ended within a minute |
| gone after | median time until the last of these processes had ended, Ray's daemons included |
| recovery | median time. Actor: from the kill to the next batch on disk. Driver: from the command with `--resume` to the next \
batch on disk, Ray's start included. While hospitals train: from the kill to the end |"""
WHEN = """\
**Moments of the kills.** The number of batches on disk; in brackets the time since the process began (driver) or since that batch
was on disk (actor). While hospitals train: the time since the process began."""
HEADER = (
    "| broken | kills | runs | identical at the end | lost or counted twice | left running | gone after | recovery |\n"
    "|---|---|---|---|---|---|---|---|"
)


def world(folder: Path) -> None:
    """The scenario and its sites."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "sites").mkdir(parents=True)
    (folder / "scenarios").mkdir()
    for name, planes in PLANES.items():
        images = 480 if name == "mercy" else 80
        source = {"kind": "organ_phantom", "images": images, "patients": images // 5, "planes": planes}
        (folder / "sites" / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "source": source}), encoding="utf-8")
    (folder / "scenarios" / "faults.yaml").write_text(yaml.safe_dump(SCENARIO), encoding="utf-8")


def begin(folder: Path, out: str, *options: str) -> subprocess.Popen[bytes]:
    """The command, in the background."""
    command = [sys.executable, "-m", "fedmerge.simulate", "scenarios/faults.yaml", "--out", out, "--quiet", *options]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with (folder / f"{Path(out).name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)


def complete(child: subprocess.Popen[bytes], deadline_s: float = 1800) -> None:
    """Wait for the end, which must be a good one."""
    if child.wait(deadline_s):
        raise SystemExit(f"a run that should have gone on ended with status {child.returncode}: see the logs")


def family(pid: int) -> dict[int, str]:
    """All processes below one, with what they were started as."""
    table = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    rows = [(int(a), int(b), c) for a, b, c in (line.split(None, 2) for line in table if len(line.split(None, 2)) == 3)]
    found: dict[int, str] = {}
    grown = {pid}
    while grown:
        below = {one: args for one, parent, args in rows if parent in grown and one not in found}
        found |= below
        grown = set(below)
    return found


def alive(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def left_over(pids: dict[int, str]) -> int:
    """How many of them live on after the grace."""
    began = time.monotonic()
    while (some := [pid for pid in pids if alive(pid)]) and time.monotonic() - began < GRACE_S:
        time.sleep(0.2)
    return len(some)


def kill_tree_head(child: subprocess.Popen[bytes]) -> dict[int, str]:
    """SIGKILL the driver alone; whom it had started."""
    started = family(child.pid)
    child.kill()
    child.wait()
    return started


def position(run: Path) -> int:
    """Batches on disk."""
    chunks = sorted((run / "progress").glob("*.npz")) if (run / "progress").is_dir() else []
    return int(chunks[-1].stem) if chunks else 0


def differences(run: Path, whole: Path) -> int:
    """Batches that are missing, counted twice, or not the same bits as in the undisturbed run."""
    a, b = (np.load(folder / "predictions.npz") for folder in (run, whole))
    batches = b["batch"]
    if not np.array_equal(a["batch"], batches) or set(a.files) != set(b.files):
        return int(batches.max()) + 1
    wrong = {int(t) for name in b.files for t in batches[_unequal(a[name], b[name])]}
    seen = [(line["t"], line["method"]) for line in map(json.loads, (run / "batches.jsonl").read_text().splitlines())]
    wanted = [(line["t"], line["method"]) for line in map(json.loads, (whole / "batches.jsonl").read_text().splitlines())]
    return len(wrong | {t for t, _ in set(seen) ^ set(wanted)} | {t for t, method in seen if seen.count((t, method)) > 1})


def _unequal(a: Any, b: Any) -> Any:
    same = (a == b) | (np.isnan(a) & np.isnan(b)) if a.dtype.kind == "f" else a == b
    return ~(same.all(1) if same.ndim == 2 else same)


def break_driver(folder: Path, whole: Path, kills: int, seconds: float, rng: random.Random) -> Tally:
    """Kill the command, give it again with --resume, kill it again, .., and let it end."""
    tally = Tally("driver, while it streams")
    while tally.kills < kills:
        out, ended = f"runs/driver-{tally.runs}", False
        for _ in range(min(KILLS_A_RUN, kills - tally.kills)):
            before, began = position(folder / out), time.monotonic()
            moment, batch = rng.uniform(0, seconds), before + rng.randrange(1, AHEAD)
            by_batch = tally.kills % 2 == 1
            child = begin(folder, out, "--resume")
            while child.poll() is None:
                time.sleep(0.01)
                if position(folder / out) >= batch if by_batch else time.monotonic() - began >= moment:
                    break
                if position(folder / out) > before and before > 0:
                    tally.recovery_s.append(time.monotonic() - began)
                    before = 10**9
            moment = time.monotonic() - began
            if child.poll() is not None:  # it was faster than what was drawn: this run is over
                ended = True
                break
            tally.bury(kill_tree_head(child))
            tally.kills += 1
            tally.moments.append(f"{position(folder / out)} ({moment:.1f} s)")
        if not ended:
            began, before = time.monotonic(), position(folder / out)
            child = begin(folder, out, "--resume")
            while child.poll() is None and position(folder / out) <= before:
                time.sleep(0.02)
            tally.recovery_s.append(time.monotonic() - began)
        complete(child)
        _compared(tally, folder / out, whole)
    return tally


def break_actor(folder: Path, whole: Path, kills: int, batches: int, rng: random.Random) -> Tally:
    """Kill the target's actor at several batches of a run."""
    tally = Tally("target's actor")
    while tally.kills < kills:
        out = f"runs/actor-{tally.runs}"
        at = sorted(rng.sample(range(batches - 4), min(KILLS_A_RUN, kills - tally.kills)))
        child = begin(folder, out)
        for batch in at:
            delay = rng.uniform(0, 0.5)
            while child.poll() is None and position(folder / out) < batch:
                time.sleep(0.005)
            time.sleep(delay)
            hosts = [pid for pid, args in family(child.pid).items() if args.startswith(ACTORS)]
            while not hosts and child.poll() is None:  # still starting, at the beginning or after the kill before
                time.sleep(0.05)
                hosts = [pid for pid, args in family(child.pid).items() if args.startswith(ACTORS)]
            if not hosts:
                break
            reached, began = position(folder / out), time.monotonic()
            os.kill(hosts[0], signal.SIGKILL)
            tally.kills += 1
            tally.moments.append(f"{reached} ({delay:.2f} s)")
            while child.poll() is None and position(folder / out) <= reached:
                time.sleep(0.02)
            tally.recovery_s.append(time.monotonic() - began)
        complete(child)
        _compared(tally, folder / out, whole)
    return tally


def _compared(tally: Tally, run: Path, whole: Path) -> None:
    wrong = differences(run, whole)
    tally.runs += 1
    tally.same += wrong == 0
    tally.lost += wrong
    shutil.rmtree(run)


def experts(run: Path) -> dict[str, str]:
    """Digest of every expert in the run's pool."""
    entries = sorted((run / "pool" / "experts").glob("[a-z]*/manifest.json"))
    return {entry["site"]: entry["sha256"] for entry in (json.loads(file.read_text()) for file in entries)}


def break_training(folder: Path, whole: dict[str, str], kills: int, seconds: float, rng: random.Random) -> list[Tally]:
    """Kill the driver, or a client, while hospitals train into an empty pool."""
    driver, client = Tally("driver, while hospitals train"), Tally("a hospital's client")
    for number in range(kills):
        for tally in (driver, client):
            out = f"runs/training-{number}"
            shutil.rmtree(folder / out, ignore_errors=True)
            options = ("--pool", f"{out}-pool", "--experts-only", "--resume")
            child, moment = begin(folder, out, *options), rng.uniform(0.2, 0.9) * seconds
            began = time.monotonic()
            time.sleep(moment)
            if tally is driver:
                tally.bury(kill_tree_head(child))
                child = begin(folder, out, *options)
            else:
                workers = [pid for pid, args in family(child.pid).items() if args.startswith("ray::ClientAppActor")]
                while not workers and child.poll() is None:
                    time.sleep(0.05)
                    workers = [pid for pid, args in family(child.pid).items() if args.startswith("ray::ClientAppActor")]
                os.kill(rng.choice(workers), signal.SIGKILL) if workers else None
            complete(child)
            tally.recovery_s.append(time.monotonic() - began - moment)
            tally.kills, tally.runs = tally.kills + 1, tally.runs + 1
            tally.moments.append(f"{moment:.1f} s")
            shutil.move(folder / f"{out}-pool", folder / out / "pool")
            found = experts(folder / out)
            tally.same += found == whole
            tally.lost += sum(found.get(site) != digest for site, digest in whole.items())
            shutil.rmtree(folder / out)
    return [driver, client]


def main(
    kills: Annotated[int, typer.Option(min=1, help="of the driver, and as many of the actor")] = 20,
    training_kills: Annotated[int, typer.Option(min=0, help="of the driver and of clients, while hospitals train")] = 4,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="where the runs go")] = Path("runs/faults"),
    page: Annotated[Path | None, typer.Option(help="write the table into this file, too")] = None,
) -> None:
    """Break things and print the table."""
    folder, rng = out.resolve(), random.Random(seed)
    world(folder)
    began = time.monotonic()
    complete(begin(folder, "runs/training", "--experts-only"))
    training = time.monotonic() - began
    began = time.monotonic()
    complete(begin(folder, "runs/whole"))
    seconds, whole = time.monotonic() - began, folder / "runs" / "whole"
    batches = json.loads((whole / "summary.json").read_text())["stream"]["batches"]
    shutil.copytree(folder / "pool", whole / "pool")
    typer.echo(f"undisturbed: training {training:.0f} s, the rest {seconds:.0f} s, {batches} batches", err=True)
    lines, moments = [HEADER], [WHEN, ""]
    for work in (
        lambda: [break_actor(folder, whole, kills, batches, rng)],
        lambda: [break_driver(folder, whole, kills, seconds, rng)],
        lambda: break_training(folder, experts(whole), training_kills, training, rng) if training_kills else [],
    ):
        found = work()
        lines += [tally.row() for tally in found]
        moments += [f"- {tally.what}: {', '.join(tally.moments)}" for tally in found]
        typer.echo(lines[-1], err=True)
    lines += ["", f"An undisturbed run took {seconds:.0f} s with the experts in the pool, and {training:.0f} s to train them."]
    lines += ["", *moments]
    typer.echo("\n".join(lines))
    if page:
        page.write_text("\n".join([EXPLAINED, "", *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
