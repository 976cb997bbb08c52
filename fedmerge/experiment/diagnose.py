"""Why an entropy-adaptive merge works in a run, or does not: predictions, coefficients, and the experts themselves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from fedmerge.adaptation.mode_connectivity import Landscape, landscapes
from fedmerge.adaptation.tasks import TargetTask
from fedmerge.errors import FolderError
from fedmerge.experiment.run_dir import reopened
from fedmerge.experiment.stream_phase import contribution
from fedmerge.experiment.training_phase import site_task
from fedmerge.federated.messages import Initial
from fedmerge.federated.model import build
from fedmerge.federated.pool.experts import ExpertPool
from fedmerge.federated.server.initialization import kept_theta_0
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.geometry.drift import Drift, drift
from fedmerge.report.comparison import FINISHED_RUN, refuse_unfinished
from fedmerge.report.metrics.decisions import entropies, kept_rows, signals
from fedmerge.report.metrics.entropy_trust import PREFIX, Trust, as_rows, how_many_right, kept_predictions, trust
from fedmerge.report.pages.diagnosis import Decisions, Diagnosis, changes_of, kept_coefficients, write_diagnosis
from fedmerge.report.terminal import Terminal, console, shown_path
from fedmerge.system.files import atomic_write, reading, see_that_writable
from fedmerge.system.process import threads

VERDICTS = (
    (0.75, "entropy is a good guide here"),
    (0.6, "entropy is some guide here"),
    (0.5, "entropy hardly guides here"),
    (0.0, "entropy misleads here"),
)
"""Least share of cases in which the surer expert is the better, and words for it: a convention."""

HILL = 0.1
"""Nats of cross-entropy from which a barrier is called one: a convention."""


@dataclass(frozen=True)
class Weights:
    """What the experts themselves say: drift from weights alone, and losses between them on the target's images."""

    raw: Drift
    learned: Drift
    landscapes: list[Landscape]


def diagnose_run(run: Path, pool: Path | None, images: int = 256, quiet: bool = False) -> None:
    """Print tables and a few words; leave `diagnose.json`, and a page with plots, in the run's folder.

    pool: where the run's experts are; None leaves out what needs them. images: of the target, for the
    losses between experts.
    Raises FolderError if it is no finished run, or if an expert of it is not in the pool.
    """
    if (file := run / "manifest.json").is_file() and not (run / "predictions.npz").exists():
        with reading(run, "no run", FINISHED_RUN):
            refuse_unfinished(run, json.loads(file.read_text(encoding="utf-8")))
    p, y = kept_predictions(run)
    see_that_writable(run, "RUN")
    found, right = trust(p, y), how_many_right(p, y)
    said = diagnosis_words(found, right)
    if changes := changes_of(run):
        said.append(f"Experts came and went ({'; '.join(changes)}): this page is about the images that all of them saw.")
    weights = of_weights(run, pool, images, Terminal(quiet)) if pool else None
    if pool and not weights:
        said.append("One hospital has an expert: there is no angle and no hill between experts to look at.")
    if weights:
        said += hills(weights.landscapes)
    rows, labels, settings = kept_rows(run)
    pairs = signals(p, y)
    seen = np.all([np.isfinite(rows[PREFIX.removeprefix("p:") + name]).all(1) for name in p], axis=0)
    single = frozenset(name for name in rows if name.startswith("expert:"))
    decided = Decisions(pairs, settings[seen], entropies(rows, labels, single))
    content = {"experts": list(p), "right_experts": right, "trust": as_rows(found), "words": said, **decided.as_row()}
    if weights:
        content["barriers"] = [one.as_row() for one in weights.landscapes]
    atomic_write(run / "diagnose.json", json.dumps(content, indent=2))
    drifts = (weights.raw, weights.learned) if weights else None
    paths = [one.as_row() for one in weights.landscapes] if weights else []
    write_diagnosis(run, Diagnosis(run.name, said, p, y, found, right, kept_coefficients(run), drifts, paths, decided))
    out = console()
    out.print(diagnosis_table(found))
    if weights:
        out.print(barrier_table(weights.landscapes))
    for line in said:
        out.print(line, markup=False)
    out.print(f"page: {shown_path(run / 'diagnose.html')}", markup=False)


def of_weights(run: Path, pool: Path, images: int, terminal: Terminal) -> Weights | None:
    """Load the run's own experts, and look between them; None where there is only one."""
    experiment, manifest = reopened(run)
    scenario, held = experiment.scenario, ExpertPool(pool)
    with reading(run / "manifest.json", "a manifest that cannot be read", "expected that of a finished run"):
        sha256, uploaded = str(manifest["initial_sha256"]), {str(site): str(digest) for site, digest in manifest["experts"].items()}
        gone = set(manifest.get("vetting", {}).get("left_out", {}))
        seen = manifest.get("inputs", {}).get(f"site {experiment.target.name}")
    base = kept_theta_0(sha256, pool)
    if base is None:
        raise _missing(run, pool, "undamaged theta_0")
    head_init = scenario.initialization.head_init if scenario.initialization else "shared_random"
    initial = Initial(base, sha256, head_init, "")
    target = experiment.target
    if seen and seen != target.source.identity(target.name, scenario.seed):
        found = f"other images of the target '{target.name}' than that run has seen"
        raise FolderError(f"{run}: found {found}; expected the same: leave out what needs them with --predictions-only")
    tasks = [site_task(experiment, number, initial) for number in range(len(experiment.sites))]
    tasks = [task for task in tasks if task.site.name in uploaded and task.site.name not in gone]
    entries = [held.entry_of(task.site.name, uploaded[task.site.name]) for task in tasks]
    lacking = [task.site.name for task, entry in zip(tasks, entries, strict=True) if entry is None]
    if lacking:
        raise _missing(run, pool, f"expert of {', '.join(lacking)}")
    if len(tasks) < 2:
        return None
    experts = [held.load(task, entry) for task, entry in zip(tasks, entries, strict=True)]
    states = {expert.site: expert.weights for expert in experts}
    bank = Bank.of(build(scenario.model, len(experiment.classes), seed=scenario.seed), states, base)
    task = TargetTask(experiment.target, scenario.model, experiment.classes, scenario.stream, (), scenario.seed, threads())
    with terminal.progress("losses between experts, on the target's images") as bars:

        def tick(done: int, total: int) -> None:
            bars.tick("pairs", done, total, "encoder, head and both")

        arrays = {name: tensor.numpy() for name, tensor in base.items()}
        between = landscapes(task, [contribution(expert) for expert in experts], arrays, images, tick)
    return Weights(drift(bank, relative=False), drift(bank, relative=True), between)


def _missing(run: Path, pool: Path, what: str) -> FolderError:
    mend = "name the run's own pool with --pool, or leave out what needs it with --predictions-only"
    return FolderError(f"{pool}: found no {what} of {run}; expected the pool of that run: {mend}")


def diagnosis_table(found: list[Trust]) -> Table:
    """One row for each pair and split."""
    shown = Table(title="entropy ratio against cross-entropy ratio")
    shown.add_column("experts")
    shown.add_column("images")
    for name in ("samples", "Pearson", "Spearman", "surer is better"):
        shown.add_column(name, justify="right")
    for one in found:
        numbers = ["undefined" if value is None else f"{value:+.2f}" for value in (one.pearson, one.spearman)]
        sides = "" if one.sides is None else f"{one.sides:.0%}"
        shown.add_row(" / ".join(one.pair), one.split, str(one.samples), *numbers, sides)
    return shown


def barrier_table(found: list[Landscape]) -> Table:
    """One row for each pair, with the barrier of what moves."""
    shown = Table(title=f"barriers between experts, on {found[0].images} images of the target" if found else "barriers")
    shown.add_column("experts")
    for part in ("both", "encoder", "head"):
        shown.add_column(f"{part}: nats", justify="right")
        shown.add_column("error", justify="right")
    by = {(one.pair, one.part): one.as_row() for one in found}
    for pair in dict.fromkeys(one.pair for one in found):
        rows = [by[pair, part] for part in ("both", "encoder", "head")]
        cells = [(f"{row['cross_entropy_barrier']:.2f}", f"{row['error_barrier']:.1%}") for row in rows]
        shown.add_row(" / ".join(pair), *[text for cell in cells for text in cell])
    return shown


def diagnosis_words(found: list[Trust], right: list[int]) -> list[str]:
    """What it means, without saying more than it does."""
    total, K = sum(right), len(right) - 1
    one_right = [one for one in found if one.split == "one right" and one.sides is not None]
    samples = sum(one.samples for one in one_right)
    said = [
        f"On {right[K] / total:.0%} of {total} images all {K} experts are right, and on {right[0] / total:.0%} none is. "
        "Choosing among the experts can only help on the other images."
    ]
    if samples:
        sides = sum(one.samples * one.sides for one in one_right if one.sides is not None) / samples
        verdict = next(text for least, text in VERDICTS if sides >= least)
        said.append(f"Where one of a pair is right and the other wrong, the surer one is right in {sides:.0%} of cases: {verdict}.")
    return said


def hills(found: list[Landscape]) -> list[str]:
    """Which pairs have a hill between them, and what makes it."""
    rows = [one.as_row() for one in found]
    high = [" / ".join(row["pair"]) for row in rows if row["part"] == "both" and row["cross_entropy_barrier"] >= HILL]
    if not high:
        return [f"Between no two experts does the loss rise by {HILL} nats above the straight line: there is no barrier."]
    mean = {part: sum(r["cross_entropy_barrier"] for r in rows if r["part"] == part) for part in ("encoder", "head")}
    more = max(mean, key=lambda part: mean[part])
    rise = f"the loss rises by {HILL} nats or more above the straight line between its ends"
    return [f"Between {'; '.join(high)} {rise}. The {more} causes most of it."]
