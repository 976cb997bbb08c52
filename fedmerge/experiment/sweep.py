"""One scenario under many settings: seeds, keys and targets, on one pool of experts, as many at a time as there are cores.

Every cell is a run like any other, in a process and a folder of its own. Cells that are done are not done again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fedmerge.errors import FolderError, Problem, ScenarioError, SiteError
from fedmerge.experiment.experiment import Experiment, Overrides, load_experiment
from fedmerge.experiment.overrides import EACH, domains_in_turn, overridden, parse, target_named
from fedmerge.report.pages.sweep import write_grid
from fedmerge.report.sweep_table import MAJORITY, DomainTable, Grid, plainly
from fedmerge.report.terminal import MINUTE_S, Pace, Terminal, shown_path
from fedmerge.system.files import reading, see_that_writable
from fedmerge.system.process import begin_apart, free_lock, process_context, threads
from fedmerge.system.yaml_loader import lines_named, read_yaml

OF_THE_TARGET = (
    "stream",
    "methods",
    "per_sample",
    "generalist",
    "target",
    "name",
    "question",
    "target_deadline_s",
    "target_restarts",
)
"""Keys of a resolved scenario on which no expert depends."""


OF_TARGETS = ("target", "target.site")
"""Keys of a scenario that `--targets` changes."""

LONGEST = 48
"""Characters of one setting in the name of a folder."""

MOST_LINES = 40
"""Lines of a table on the terminal; a longer one is in the page alone."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. settings: in the order of the command line. joins: the scenario's own target, where it trains."""

    seed: int
    settings: tuple[tuple[str, Any], ...]
    target: str | None
    joins: tuple[str, ...] = ()

    @property
    def left_out(self) -> str | None:
        """The name of its target, which may be given as a path."""
        return Path(self.target).stem if self.target else None

    @property
    def name(self) -> str:
        """The name of its folder."""
        words = [f"{key.rpartition('.')[2]}={plainly(value)}" for key, value in self.settings]
        words = [_file_name(word) for word in words]
        return "-".join([*([self.left_out] if self.left_out else []), *words, f"seed{self.seed}"])

    def overrides(self, methods: tuple[str, ...]) -> Overrides:
        """The scenario's changes for this cell."""
        return Overrides(seed=self.seed, settings=self.settings, target=self.target, add_sites=self.joins, methods=methods)

    def options(self, methods: tuple[str, ...]) -> list[str]:
        """The same for the command line."""
        found = ["--seed", str(self.seed)]
        for key, value in self.settings:
            found += ["--set", f"{key}={json.dumps(value)}"]
        if self.target:
            found += ["--target", self.target, *[word for name in self.joins for word in ("--add-site", name)]]
        return found + (["--methods", ",".join(methods)] if methods else [])


def _file_name(word: str) -> str:
    """The word without what a file system minds; a digest ends what had to be cut."""
    plain = re.sub(r"[^\w=.\-]+", "_", word)
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST]}_{hashlib.sha256(word.encode()).hexdigest()[:6]}"


@dataclass(frozen=True)
class Sweep:
    """What is swept, where it goes, how many cells run at once, and for which tools they write numbers."""

    scenario: Path
    cells: tuple[Cell, ...]
    methods: tuple[str, ...]
    out: Path
    pool: Path
    jobs: int
    log: tuple[str, ...] = ()
    running: set[BaseProcess] = field(default_factory=set, compare=False)


def cells_of(scenario: Path, seeds: Sequence[int], settings: Sequence[str], targets: str) -> tuple[Cell, ...]:
    """All combinations.

    seeds: none means the scenario's own. targets: "" for the scenario's own, "each" for all its domains in turn, or names.
    """
    content = read_yaml(scenario)
    axes = [parse(text) for text in settings]
    keys = [key for key, _ in axes]
    if len(set(keys)) < len(keys):
        raise ScenarioError(
            [Problem("--set", ", ".join(keys), "a key twice", "every key once, its values with commas between them")]
        )
    if "seed" in keys:
        seeds = _seeds_of(dict(axes)["seed"], seeds)
    for key, values in axes if targets else ():
        if key in OF_TARGETS and (named := [value for value in values if value != EACH]):
            found = f"{named[0]!r}, and --targets, which changes the same key"
            raise ScenarioError([Problem("--set", key, found, "one of them")])
    combinations = list(itertools.product(*[[(key, value) for value in values] for key, values in axes if key != "seed"]))
    seeds = seeds or [content.get("seed") or 0]
    with lines_named(scenario):
        chosen = [(target, one) for one in combinations for target in _targets(scenario, content, one, targets)]
    order = list(dict.fromkeys(target for target, _ in chosen))
    chosen.sort(key=lambda pair: order.index(pair[0]))
    cells = tuple(Cell(seed, one, *target) for target, one in chosen for seed in seeds)
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        found, mend = f"two cells with the folder '{twice[0]}'", "Give every value and every target once"
        raise ScenarioError([Problem("--set, --targets", "", found, "a folder of its own for each", mend)])
    return cells


def _seeds_of(values: Sequence[Any], counted: Sequence[int]) -> Sequence[int]:
    """The seeds that `--set seed=3,5` names. Raises ScenarioError for what is none, and where `--seeds` counts them, too."""
    if counted:
        raise ScenarioError([Problem("--set", "seed", f"{len(values)} seeds, and --seeds {len(counted)}", "one of them")])
    if odd := [value for value in values if type(value) is not int or value < 0]:
        raise ScenarioError([Problem("--set", "seed", repr(odd[0]), "whole numbers, 0 or greater")])
    return values


def _targets(
    scenario: Path, content: dict[str, Any], settings: tuple[tuple[str, Any], ...], wanted: str
) -> list[tuple[str | None, tuple[str, ...]]]:
    """Under these settings: every target, and who trains beside the scenario's sites. None: the scenario's own target."""
    changed = overridden(content, Overrides(settings=settings))
    own = target_named(changed)
    names = list(dict.fromkeys(name.strip() for name in wanted.split(",") if name.strip()))
    if wanted and not names:
        raise ScenarioError([Problem("--targets", "", f"'{wanted}'", "'each', or names of sites with commas between them")])
    if not names and own != EACH:
        return [(None, ())]
    if names not in ([], [EACH]):
        return [(name, ()) for name in names]
    return [*domains_in_turn(changed, str(scenario))]


def _plan(sweep: Sweep, cell: Cell) -> Experiment:
    """The experiment of a cell. Raises ScenarioError, which says of which target, where the sweep has several."""
    try:
        return load_experiment(sweep.scenario, cell.overrides(sweep.methods))
    except ScenarioError as error:
        of = f" (target '{cell.left_out}')" if cell.left_out else ""
        raise ScenarioError([replace(problem, where=problem.where + of) for problem in error.problems]) from None


def run_sweep(sweep: Sweep, quiet: bool = False) -> Grid:
    """Experts first, one set after the other with all cores; then the streams side by side; then the tables.

    Raises ScenarioError before anything starts if any cell cannot run, FolderError if the folder is another's, and SiteError if
    cells failed: then the tables hold the others, and name what is missing.
    """
    plans = {cell.name: _plan(sweep, cell) for cell in sweep.cells}
    with _claimed(sweep, quiet) as terminal:
        left = [cell for cell in sweep.cells if not _done(cell, sweep.out / "cells" / cell.name, plans[cell.name])]
        terminal.status.put(cells=[cell.name for cell in sweep.cells], left=[cell.name for cell in left])
        terminal.say(f"{len(sweep.cells)} cells, {len(sweep.cells) - len(left)} of them done before; {sweep.jobs} at a time")
        for remark in dict.fromkeys(remark for cell in left for remark in plans[cell.name].remarks()):
            terminal.say(remark)
        keys = {cell.name: _experts_key(plans[cell.name]) for cell in left}
        first = {keys[cell.name]: cell for cell in reversed(left)}
        broken = _experts(sweep, first, terminal, quiet)
        failed = {cell.name: broken[key] for cell in left if (key := keys[cell.name]) in broken}
        going = [cell for cell in left if cell.name not in failed]
        failed |= _streams(sweep, going, any(plans[cell.name].scenario.backend != "local" for cell in going), terminal)
        ended = [cell for cell in sweep.cells if cell.name not in failed]
        if not ended:
            raise SiteError(_reasons(failed))
        grid = Grid.of([_row(cell, sweep.out / "cells" / cell.name) for cell in ended], missing=tuple(failed))
        write_grid(sweep.out, grid, sweep.scenario.stem)
        if failed:
            words = f"{len(ended)} of {len(sweep.cells)} cells are done, and in the tables ({shown_path(sweep.out / 'sweep.html')})"
            raise SiteError(f"{_reasons(failed)}\n{words}. The same command runs the others again")
    if table := DomainTable.of(grid):
        terminal.table("accuracy on the domain left out of training, %", *table.cells())
    elif len(grid.lines) <= MOST_LINES:
        terminal.table("accuracy, %, and its difference to the mean, points", *grid.brief())
    terminal.say(f"table and plots: {shown_path(sweep.out / 'sweep.html')}")
    return grid


@contextmanager
def _claimed(sweep: Sweep, quiet: bool) -> Iterator[Terminal]:
    """The folder for this sweep alone, and `status.json` in it, for `fedmerge watch`. Raises FolderError."""
    if (sweep.out / "manifest.json").exists():
        raise FolderError(f"--out: found '{sweep.out}', the folder of a run; expected one for the sweep. Choose another")
    see_that_writable(sweep.out, "--out")
    lock = free_lock(sweep.out / ".lock")
    if lock is None:
        raise FolderError(
            f"--out: found '{sweep.out}', where another sweep runs; expected a folder for this one alone. Wait, or choose another"
        )
    terminal = Terminal(quiet, status=sweep.out / "status.json")
    terminal.status.put(state="running", sweep=sweep.scenario.stem, began=time.time())
    try:
        yield terminal
        terminal.status.put(state="done")
    except BaseException as error:
        terminal.status.put(state="failed", reason=str(error) or type(error).__name__)
        raise
    finally:
        lock.release()


def _experts(sweep: Sweep, sets: dict[str, Cell], terminal: Terminal, quiet: bool) -> dict[str, str]:
    """Train every set of experts; by its key, what a set said that failed."""
    failed: dict[str, str] = {}
    for number, (key, cell) in enumerate(sets.items()):
        words = f"experts {number + 1} of {len(sets)}: {cell.name}"
        terminal.status.put(phase=words)
        terminal.say(words)
        if said := _simulate(sweep, cell, "--experts-only", quiet=quiet):
            failed[key] = said
            terminal.status.put(failed={sets[key].name: said for key, said in failed.items()})
            terminal.say(f"  failed: {said}")
    return failed


def _reasons(failed: dict[str, str]) -> str:
    """A line for each reason, with the cells that it stopped."""
    cells: dict[str, list[str]] = {}
    for name, said in failed.items():
        cells.setdefault(said, []).append(name)
    return "\n".join(f"cell{'s' * (len(names) > 1)} {', '.join(names)}: {said}" for said, names in cells.items())


def _streams(sweep: Sweep, left: list[Cell], needs_ray: bool, terminal: Terminal) -> dict[str, str]:
    """Run all cells that are left, as many at a time as the sweep says; what those said that failed."""
    failed: dict[str, str] = {}
    with _cluster() if needs_ray else nullcontext(), ThreadPoolExecutor(sweep.jobs) as workers, _ended_with(sweep.running, workers):
        terminal.status.put(phase=f"streams, {sweep.jobs} at a time", since=time.time())
        each = str(max(1, threads() // sweep.jobs))
        results = [workers.submit(_simulate, sweep, cell, "--threads", each) for cell in left]
        for number, (cell, said) in enumerate(zip(left, in_their_order(results, terminal.say), strict=True)):
            terminal.say(f"cell {number + 1} of {len(left)}: {cell.name}{f' failed: {said}' if said else ''}")
            if said:
                failed[cell.name] = said
                terminal.status.put(failed=failed)
    return failed


def in_their_order(results: Sequence[Future[str]], say: Callable[[str], None], every: float = MINUTE_S) -> Iterator[str]:
    """What each gives. Meanwhile, a line as often as `every` seconds: how many are done, and how much time is left."""
    pace = Pace()
    pace.words(0)
    for result in results:
        while not result.done():
            wait([result], every)
            if not result.done():
                done = sum(one.done() for one in results)
                say(f"  {pace.words(done / len(results))}: {done} of {len(results)} cells are done")
        yield result.result()


def _row(cell: Cell, folder: Path) -> dict[str, Any]:
    file = folder / "summary.json"
    with reading(file, "a summary that cannot be read", f"expected that of a finished run. Delete {folder} to run the cell again"):
        summary = json.loads(file.read_text(encoding="utf-8"))
        always = {MAJORITY: summary["majority_class"]} if "majority_class" in summary else {}  # a cell of an older version has none
        methods = {**summary["methods"], **always}
        _ = [(float(row["accuracy"]), float(row["balanced_accuracy"]), row["ranked"]) for row in methods.values()]
    return {"seed": cell.seed, "target": cell.left_out, "settings": dict(cell.settings), "methods": methods}


def _done(cell: Cell, folder: Path, experiment: Experiment) -> bool:
    """Whether the folder holds a finished run of this very scenario, on the images and weights that are there now.

    One that cannot be read is none, and the cell runs again.
    """
    try:
        with reading(folder, "no run", "expected a finished one"):
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            same = manifest["status"] == "done" and manifest["scenario_sha256"] == experiment.sha256()
        if same:
            _row(cell, folder)
    except FolderError:
        return False
    return bool(same and manifest.get("inputs") == experiment.inputs())


def _experts_key(experiment: Experiment) -> str:
    resolved = {key: value for key, value in experiment.resolved().items() if key not in OF_THE_TARGET}
    return json.dumps(resolved, sort_keys=True)


def _simulate(sweep: Sweep, cell: Cell, *options: str, quiet: bool = True) -> str:
    """Run one cell in a process of its own, which shows its progress here unless it is quiet; what it said if it failed."""
    where = ["--out", str(sweep.out / "cells" / cell.name), "--pool", str(sweep.pool), "--resume", *["--quiet"] * quiet]
    where += [word for tool in sweep.log for word in ("--log", tool)]
    words = [str(sweep.scenario), *cell.options(sweep.methods), *where, *options]
    context = process_context(*OF_A_REPORT)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_alone, args=(words, dict(os.environ), there, quiet))
    process.start()
    there.close()
    sweep.running.add(process)
    try:
        with open(here.fileno(), encoding="utf-8", errors="replace", closefd=False) as errors:
            said = errors.read().strip().splitlines()
        process.join()
    except BaseException:
        process.terminate()  # it keeps what is done, and cleans up
        raise
    finally:
        sweep.running.discard(process)
        here.close()
    if process.exitcode == 0:
        return ""
    said = said or [f"exit status {process.exitcode}"]
    return said[-1] if process.exitcode == 1 else "\n".join(said)  # of a traceback the last line, of a user's mistake all


OF_A_REPORT = ("jinja2", "matplotlib.figure")
"""What the report of every cell imports."""


def _alone(words: list[str], environment: dict[str, str], errors: Connection, quiet: bool) -> None:
    """In a cell's own process: `python -m fedmerge.simulate` with these words."""
    begin_apart(environment, signal.SIGTERM)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    if quiet:
        os.dup2(nothing, 1)
    os.dup2(errors.fileno(), 2)
    errors.close()
    for name, number in {"stdout": 1, "stderr": 2}.items():  # anew: another kind of file than the server's
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115 - for as long as the process runs
    sys.argv[1:] = words
    runpy.run_module("fedmerge.simulate", run_name="__main__")


@contextmanager
def _ended_with(running: set[BaseProcess], workers: ThreadPoolExecutor) -> Iterator[None]:
    """Cells that have begun end when the block is interrupted, and no other begins."""
    try:
        yield
    except BaseException:
        workers.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
        raise


@contextmanager
def _cluster() -> Iterator[None]:
    """One Ray for all cells; where RAY_ADDRESS names a cluster, that one."""
    if os.environ.get("RAY_ADDRESS"):
        yield
        return
    from fedmerge.adaptation.ray.cluster import shared_ray

    with shared_ray() as address:
        os.environ["RAY_ADDRESS"] = address
        try:
            yield
        finally:
            del os.environ["RAY_ADDRESS"]
