"""A run from beginning to end: gather experts, let the target consume its stream, report."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmerge.errors import SiteError
from fedmerge.experts.gather import Job, Outcome
from fedmerge.experts.initialisation import Initial, initialise
from fedmerge.experts.pool import Expert, ExpertPool
from fedmerge.experts.train import SiteTask
from fedmerge.plan import Plan
from fedmerge.report.progress import Progress
from fedmerge.report.record import MethodInfo, RunRecord, SiteRow, StreamFacts
from fedmerge.report.step import Step
from fedmerge.report.terminal import Terminal, shown_path
from fedmerge.report.write import write
from fedmerge.run_folder import RunFolder
from fedmerge.target.task import Contribution, TargetTask

BATCHES_AT_A_TIME = 4
"""Batches between two signs of life from the target, and between two snapshots."""


@dataclass(frozen=True)
class Request:
    """Where a run reads and writes. resume: go on from the folder's last snapshot, if it has one."""

    out: Path
    pool: Path
    resume: bool = False
    quiet: bool = False


def run(plan: Plan, request: Request) -> dict[str, Any]:
    """The whole story; returns the summary. Raises FedmergeError; experts that have arrived are kept in every case."""
    began = time.perf_counter()
    terminal = Terminal(request.quiet)
    with RunFolder(request.out, plan, keep=request.resume) as folder:
        terminal.say(f"{plan.scenario.name}: {len(plan.sites)} sites, target '{plan.target.name}', seed {plan.scenario.seed}")
        with folder.phase("initialisation"):
            initial = start(plan, request, terminal)
        tasks = [site_task(plan, number, initial) for number in range(len(plan.sites))]
        with folder.phase("hospitals"):
            outcomes = gather(plan, tasks, initial, request, terminal)
        experts = [ExpertPool(request.pool).load(task) for task in tasks]
        folder.manifest["initial_sha256"] = initial.sha256
        folder.manifest["experts"] = {expert.site: expert.sha256 for expert in experts}
        with folder.phase("stream"):
            progress, seen = consume(plan, initial, experts, request, terminal)
        folder.manifest["index_sha256"] = seen.description.index_sha256
        folder.manifest["device"] = seen.description.device
        with folder.phase("report"):
            summary = write(request.out, record_of(plan, initial, experts, outcomes, progress.steps, seen, folder))
            progress.close()
    terminal.summary(summary)
    terminal.say(f"report: {shown_path(request.out / 'report.html')} ({time.perf_counter() - began:.0f} s)")
    return summary


def start(plan: Plan, request: Request, terminal: Terminal) -> Initial:
    """theta_0, with a head from federated linear probing if the scenario asks for one."""
    scenario = plan.scenario
    with terminal.progress("initialisation: theta_0, which all sites share") as bars:
        initial = initialise(
            scenario.initialisation,
            scenario.model,
            len(plan.classes),
            scenario.seed,
            request.pool,
            lambda done, total, text: bars.tick("coordinator", done, total, text),
        )
        if initial.head_init == "fed_lp":
            from fedmerge.experts.federation import probe

            tasks = tuple(site_task(plan, number, initial) for number in range(len(plan.sites)))
            initial = probe(job_of(plan, tasks, initial, request), lambda t: bars.tick(t.site, t.done, t.total, t.text))
    return initial


def gather(plan: Plan, tasks: list[SiteTask], initial: Initial, request: Request, terminal: Terminal) -> dict[str, Outcome]:
    """Experts of all sites into the pool. Raises SiteError that names every site without one; the others' are kept."""
    from fedmerge.experts.federation import gather as ask

    pool = ExpertPool(request.pool)
    missing = [task.site.name for task in tasks if not pool.has(task)]
    title = f"hospitals: {', '.join(missing)} train" if missing else "hospitals: every expert is in the pool; nobody trains"
    with terminal.progress(title) as bars:
        outcomes = ask(job_of(plan, tuple(tasks), initial, request), lambda t: bars.tick(t.site, t.done, t.total, t.text))
    failed = [f"site '{outcome.site}': {outcome.reason}" for outcome in outcomes.values() if outcome.reason]
    if failed:
        kept = f"{len(outcomes) - len(failed)} of {len(outcomes)} experts are in the pool, and are not trained again"
        raise SiteError("\n".join([*failed, kept]))
    return outcomes


def site_task(plan: Plan, number: int, initial: Initial) -> SiteTask:
    """What one site is asked."""
    scenario = plan.scenario
    return SiteTask(
        site=plan.sites[number],
        model=scenario.model,
        training=scenario.training,
        classes=plan.classes,
        seed=scenario.seed,
        initial_sha256=initial.sha256,
        head_init=initial.head_init,
    )


def job_of(plan: Plan, tasks: tuple[SiteTask, ...], initial: Initial, request: Request) -> Job:
    """What is gathered from the sites, and where it goes."""
    return Job(tasks, initial, request.pool, request.out / "audit.jsonl", plan.scenario.training.deadline_s)


@dataclass(frozen=True)
class Seen:
    """What the target told beside its steps."""

    description: Any
    answers: Any
    forwards_run: int


def consume(plan: Plan, initial: Initial, experts: list[Expert], request: Request, terminal: Terminal) -> tuple[Progress, Seen]:
    """The stream from beginning to end, or from the last snapshot: every batch is counted once."""
    from fedmerge.target.actor import RemoteTarget

    scenario = plan.scenario
    task = TargetTask(plan.target, scenario.model, plan.classes, scenario.stream, scenario.methods, scenario.seed, _cores())
    contributions = [Contribution(e.site, _arrays(e.weights), e.n, e.temperature) for e in experts]
    with RemoteTarget(task, contributions, _arrays(initial.weights), scenario.target_deadline_s) as target:
        description = target.describe()
        key = {"index": description.index_sha256, "experts": [expert.sha256 for expert in experts]}
        progress = Progress.open(request.out, key, request.resume)
        if progress.snapshot:
            target.restore(progress.snapshot)
            terminal.say(f"target: {progress.snapshot['position']} of {description.batches} batches were done before")
        title = f"target: {description.batches} batches of '{description.kind}' on {description.device}"
        terminal.say(title)
        with terminal.stream(description.batches, list(description.rows)) as bars:
            bars.add(progress.steps)
            for steps in _advances(target):
                bars.add(steps)
                progress.add(steps, target.snapshot())
        return progress, Seen(description, target.answers(), target.forwards_so_far())


def _advances(target: Any) -> Iterator[list[Step]]:
    while steps := target.advance(BATCHES_AT_A_TIME):
        yield steps


def record_of(
    plan: Plan,
    initial: Initial,
    experts: list[Expert],
    outcomes: dict[str, Outcome],
    steps: list[Step],
    seen: Seen,
    folder: RunFolder,
) -> RunRecord:
    """All that the report may show."""
    description = seen.description
    titles = {site.name: site.title for site in plan.sites}
    facts = {name: getattr(description, name) for name in StreamFacts.__dataclass_fields__}
    return RunRecord(
        scenario=plan.scenario.name,
        question=plan.scenario.question,
        seed=plan.scenario.seed,
        classes=plan.classes,
        sites=[_site_row(expert, titles[expert.site], outcomes[expert.site].trained) for expert in experts],
        target=plan.target.name,
        target_title=plan.target.title,
        target_samples=description.shown,
        initialisation=initial.description,
        stream=StreamFacts(**facts),
        labels=seen.answers.labels,
        domains=seen.answers.domains,
        steps=steps,
        methods={name: MethodInfo(**asdict(info)) for name, info in description.rows.items()},
        forwards_run=seen.forwards_run / description.batches,
        audit=[item for expert in experts for item in expert.audit],
        manifest=folder.manifest,
        yaml=(folder.path / "scenario.yaml").read_text(encoding="utf-8"),
        seconds=folder.manifest["phases_seconds"],
    )


def _site_row(expert: Expert, title: str, trained: bool) -> SiteRow:
    return SiteRow(
        name=expert.site,
        title=title,
        trained=trained,
        expert_sha256=expert.sha256,
        n=expert.n,
        validation_accuracy=expert.validation_accuracy,
        temperature=expert.temperature,
        runs=expert.runs,
        samples=None if expert.samples is None else expert.samples.numpy(),
    )


def _arrays(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in state.items()}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
