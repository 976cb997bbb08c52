"""A run from beginning to end: gather experts, let the target consume its stream, report."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from fedmerge.experts.asking import Outcome
from fedmerge.experts.checkpoint import read_state
from fedmerge.experts.initialisation import Initial
from fedmerge.experts.pool import Expert
from fedmerge.experts.train import SiteTask
from fedmerge.experts.upload import state_digest
from fedmerge.federate import gather, load_experts, site_task, start
from fedmerge.plan import Plan
from fedmerge.report.ledger import Ledger
from fedmerge.report.progress import Progress
from fedmerge.report.record import MethodInfo, RunRecord, SiteRow, StreamFacts
from fedmerge.report.step import Step
from fedmerge.report.terminal import Terminal, shown_path
from fedmerge.report.write import write
from fedmerge.run_folder import Request, RunFolder
from fedmerge.target.holding import check_limit
from fedmerge.target.task import Contribution, TargetTask

BATCHES_AT_A_TIME = 4
"""Batches between two signs of life from the target, and between two snapshots."""


def prepare(plan: Plan, request: Request) -> None:
    """Only the hospitals' part: afterwards all experts are in the pool, with what the scenario's uploads ask for."""
    with RunFolder(request.out, plan, keep=request.resume) as folder:
        hospitals(plan, request, folder, Terminal(request.quiet))


def hospitals(
    plan: Plan, request: Request, folder: RunFolder, terminal: Terminal
) -> tuple[Initial, list[SiteTask], dict[str, Outcome]]:
    """theta_0 to all sites, and their experts into the pool. Raises SiteError."""
    with folder.phase("initialisation"):
        initial = start(plan, request, terminal)
    tasks = [site_task(plan, number, initial) for number in range(len(plan.sites))]
    with folder.phase("hospitals"):
        return initial, tasks, gather(plan, tasks, initial, request, terminal)


def run(plan: Plan, request: Request) -> dict[str, Any]:
    """The whole story; returns the summary. Raises FedmergeError; experts that have arrived are kept in every case."""
    began = time.perf_counter()
    terminal = Terminal(request.quiet)
    with RunFolder(request.out, plan, keep=request.resume) as folder:
        terminal.say(f"{plan.scenario.name}: {len(plan.sites)} sites, target '{plan.target.name}', seed {plan.scenario.seed}")
        scenario = plan.scenario
        check_limit(scenario.target_max_bytes, len(plan.sites), scenario.model, len(plan.classes), scenario.methods)
        generalist = read_generalist(plan)
        initial, tasks, outcomes = hospitals(plan, request, folder, terminal)
        experts = load_experts(tasks, request)
        folder.manifest["initial_sha256"] = initial.sha256
        folder.manifest["experts"] = {expert.site: expert.sha256 for expert in experts}
        with folder.phase("stream"):
            progress, seen = consume(plan, initial, Sent(experts, generalist), request, terminal)
        folder.manifest["index_sha256"] = seen.description.index_sha256
        folder.manifest["device"] = seen.description.device
        folder.manifest["per_sample"] = seen.per_sample
        folder.manifest["bank"] = seen.description.bank
        with folder.phase("report"):
            summary = write(request.out, record_of(plan, initial, experts, outcomes, progress.ledger, seen, folder))
            progress.close()
    terminal.summary(summary)
    terminal.say(f"report: {shown_path(request.out / 'report.html')} ({time.perf_counter() - began:.0f} s)")
    return summary


@dataclass(frozen=True)
class Seen:
    """What the target told beside its steps."""

    description: Any
    answers: Any
    forwards_run: int
    per_sample: dict[str, Any]


@dataclass(frozen=True)
class Sent:
    """What the target is sent beside theta_0. generalist: the scenario's own model, or None."""

    experts: list[Expert]
    generalist: dict[str, Any] | None


def read_generalist(plan: Plan) -> dict[str, Any] | None:
    """The scenario's generalist. Raises CheckpointError if it does not fit the model."""
    scenario = plan.scenario
    return read_state(scenario.generalist, "generalist", scenario.model, len(plan.classes)) if scenario.generalist else None


def consume(plan: Plan, initial: Initial, sent: Sent, request: Request, terminal: Terminal) -> tuple[Progress, Seen]:
    """The stream from beginning to end, or from the last snapshot: every batch is counted once."""
    from fedmerge.target.actor import RemoteTarget

    scenario = plan.scenario
    task = TargetTask(
        site=plan.target,
        model=scenario.model,
        classes=plan.classes,
        schedule=scenario.stream,
        methods=scenario.methods,
        seed=scenario.seed,
        threads=request.threads or _cores(),
        per_sample=scenario.per_sample,
        shared_head=initial.head_init != "per_site_random",
        generalist=_arrays(sent.generalist) if sent.generalist else None,
        max_bytes=scenario.target_max_bytes,
    )
    contributions = [contribution(expert) for expert in sent.experts]
    with RemoteTarget(task, contributions, _arrays(initial.weights), scenario.target_deadline_s) as target:
        description = target.describe()
        key: dict[str, Any] = {"index": description.index_sha256, "experts": [expert.sha256 for expert in sent.experts]}
        if sent.generalist:
            key["generalist"] = state_digest(sent.generalist)
        progress = Progress.open(request.out, key, request.resume)
        if progress.snapshot:
            target.restore(progress.snapshot)
            terminal.say(f"target: {progress.snapshot['position']} of {description.batches} batches were done before")
        title = f"target: {description.batches} batches of '{description.kind}' on {description.device}"
        terminal.say(title)
        with terminal.stream(description.batches, list(description.rows)) as bars:
            bars.add(progress.ledger.steps())
            for steps in _advances(target):
                bars.add(steps)
                progress.add(steps, target.snapshot())
        return progress, Seen(description, target.answers(), target.forwards_so_far(), target.per_sample_ways())


def contribution(expert: Expert) -> Contribution:
    """An expert as it travels to the target."""
    statistics = {kind: _arrays(state) for kind, state in expert.statistics.items()}
    return Contribution(expert.site, _arrays(expert.weights), expert.n, expert.temperature, statistics)


def _advances(target: Any) -> Iterator[list[Step]]:
    while steps := target.advance(BATCHES_AT_A_TIME):
        yield steps


def record_of(
    plan: Plan,
    initial: Initial,
    experts: list[Expert],
    outcomes: dict[str, Outcome],
    steps: Ledger,
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
