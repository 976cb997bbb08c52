"""The target's part of a run: it is given experts, consumes its stream, and tells what every method predicted.

How long a target's stream is: counted where the images are, and nothing but the count comes back.

The course of the stream: who is there from which batch on, and the walk through it, from change to change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import Arrays, Contribution, Federated, TargetTask
from fedmerge.data.corrupted_images import Gallery
from fedmerge.data.datasets._base import Geometry
from fedmerge.errors import ScenarioError, SiteError
from fedmerge.experiment.experiment import Experiment, RunOptions
from fedmerge.experiment.scenario import Scenario
from fedmerge.federated.client.site_log import discreet
from fedmerge.federated.messages import Initial
from fedmerge.federated.model import build
from fedmerge.federated.pool.checkpoint import read_state
from fedmerge.federated.pool.experts import Expert
from fedmerge.federated.pool.global_models import GlobalModel
from fedmerge.federated.security.audit import state_digest
from fedmerge.federated.site import Site
from fedmerge.merging.prior import head_bias, log_shares, under_prior
from fedmerge.merging.state import Roster
from fedmerge.report.batch_log import Ledger, Step
from fedmerge.report.checkpoint import Progress
from fedmerge.report.metrics.disagreement import most_apart, votes
from fedmerge.report.plots.layout import binned
from fedmerge.report.records import Disputed, StreamFacts
from fedmerge.report.run_log import RunLog
from fedmerge.report.terminal import Terminal
from fedmerge.stream.events import past_end, rosters
from fedmerge.stream.schedules._base import Schedule
from fedmerge.stream.stream import Stream
from fedmerge.system.process import owners, threads


@dataclass(frozen=True)
class Seen:
    """What the target told beside its steps."""

    description: Any
    answers: Any
    forwards_run: int
    per_sample: dict[str, Any]
    course: list[Roster]
    deaths: list[int]
    disputed: Disputed | None = None


@dataclass(frozen=True)
class Sent:
    """What the target is sent beside theta_0. generalist: the scenario's own model, or None. federated: rows made in rounds."""

    experts: list[Expert]
    generalist: dict[str, Any] | None
    federated: tuple[GlobalModel, ...] = ()

    def digests(self) -> dict[str, Any]:
        """Of all models: a run goes on only with the same."""
        found: dict[str, Any] = {"experts": [expert.sha256 for expert in self.experts]}
        if self.generalist:
            found["generalist"] = state_digest(self.generalist)
        if self.federated:
            found["federated"] = {model.strategy.key: state_digest(model.stand.theta) for model in self.federated}
        return found


def read_generalist(experiment: Experiment) -> dict[str, Any] | None:
    """The scenario's generalist, if it is a file. Raises CheckpointError if it does not fit the model."""
    scenario, keys = experiment.scenario, [strategy.key for strategy in experiment.scenario.federated]
    if scenario.generalist is None or str(scenario.generalist) in keys:
        return None
    return read_state(scenario.generalist, "generalist", scenario.model, len(experiment.classes))


def consume(
    experiment: Experiment, initial: Initial, sent: Sent, options: RunOptions, terminal: Terminal, log: RunLog
) -> tuple[Progress, Seen]:
    """The stream from beginning to end, or from the last snapshot: every batch is counted once.

    Raises SiteError where no row is left, because every method names an expert that was left out.
    """
    _tell_left_out(experiment, sent, terminal)
    task, scenario = target_task(experiment, initial, sent, options), experiment.scenario
    course = course_of(experiment, task.experts)
    experts, base = contributions(experiment, initial, sent.experts)
    first = [experts[name] for name in course[0].experts]
    with target_of(task, first, base, scenario) as target:
        description = target.describe()
        key = {"index": description.stream.index_sha256, "course": [[roster.start, *roster.experts] for roster in course]}
        key |= {**sent.digests(), "images": experiment.target.source.identity(experiment.target.name, scenario.seed)}
        progress = Progress.open(options.out, key, options.resume)
        walk = Walk(target, course, experts, terminal)
        if progress.snapshot:
            walk.change(progress.snapshot["experts"])
            target.restore(progress.snapshot)
            walk.done = progress.snapshot["position"]
            terminal.say(f"target: {progress.snapshot['position']} of {description.stream.batches} batches were done before")
        title = f"target: {description.stream.batches} batches of '{description.stream.kind}' on {description.device}"
        terminal.say(title)
        terminal.status.put(phase=title, since=time.time(), stream=_told(description, course, walk.done))
        with terminal.stream(description.stream.batches, list(description.rows)) as bars:
            bars.add(progress.ledger.steps())
            for step in progress.ledger.steps() if options.log else ():
                log.steps([step], at_batch(course, step.t).experts)
            for steps in walk:
                bars.add(steps)
                log.steps(steps, walk.there)
                progress.add(steps, target.snapshot())
        told = description, target.answers(), target.forwards_so_far(), target.per_sample_ways()
        return progress, Seen(*told, course, target.deaths, _disputed(target, experiment, description, progress.ledger))


def _disputed(target: Any, experiment: Experiment, description: Any, ledger: Ledger) -> Disputed | None:
    """Images on which ranked methods disagree most; the target is asked for none unless its own file grants some."""
    granted = experiment.target.disagreements
    if not granted:
        return None
    ranked = [name for name in ledger.methods if description.rows[name].ranked]
    places = most_apart(votes(ranked, description.stream.samples, ledger.probabilities)[1], granted).tolist()
    return Disputed(tuple(places), target.disputed(places)) if places else None


def _told(description: Any, course: Sequence[Roster], done: int) -> dict[str, Any]:
    """What who watches may know of the stream as it begins. done: batches that an earlier run has done."""
    facts: StreamFacts = description.stream
    shares, names = facts.mix
    at, mix = binned(shares)
    return {
        "kind": facts.kind,
        "batches": facts.batches,
        "images": facts.samples,
        "done": done,
        "methods": {name: {"kind": row.kind, "ranked": row.ranked} for name, row in description.rows.items()},
        "course": [[roster.start, list(roster.experts)] for roster in course],
        "mix": {"names": names, "at": at.tolist(), "shares": mix.round(4).tolist()},
    }


def target_of(task: TargetTask, experts: Sequence[Contribution], base: Arrays, scenario: Scenario) -> AbstractContextManager[Any]:
    """The target in this process, or as a Ray actor. Ray is imported only where it is used."""
    if scenario.backend == "local":
        return _in_this_process(task, experts, base)
    from fedmerge.adaptation.ray.actor import RemoteTarget

    return RemoteTarget(task, experts, base, scenario.target_deadline_s, scenario.target_restarts)


@contextmanager
def _in_this_process(task: TargetTask, experts: Sequence[Contribution], base: Arrays) -> Iterator[TargetSite]:
    before = torch.get_num_threads()
    try:
        with discreet(task.site.name):
            site = TargetSite(task, experts, base)
        yield site
    finally:
        torch.set_num_threads(before)


def target_task(experiment: Experiment, initial: Initial, sent: Sent, options: RunOptions) -> TargetTask:
    """What the target is given beside the experts."""
    scenario = experiment.scenario
    return TargetTask(
        site=experiment.target,
        model=scenario.model.as_sent,
        classes=experiment.target_classes,
        schedule=scenario.stream,
        methods=usable(experiment, sent.experts),
        seed=scenario.seed,
        threads=options.threads or threads(),
        per_sample=scenario.per_sample,
        shared_head=initial.head_init != "per_site_random",
        generalist=_arrays(sent.generalist | initial.target_head) if sent.generalist else None,
        experts=tuple(expert.site for expert in sent.experts),
        federated=tuple(_row(model, initial) for model in sent.federated),
        cap=min((one.most for one in scenario.defenses if one.at_target), default=None),
        max_bytes=scenario.target.max_bytes,
        precision=scenario.target.precision or "float32",
        shards=scenario.target.shards or 1,
        gpus=scenario.target.gpus,
        resource=scenario.target.resource,
    )


def _tell_left_out(experiment: Experiment, sent: Sent, terminal: Terminal) -> None:
    there = {method.key for method in usable(experiment, sent.experts)}
    gone = [method for method in experiment.scenario.methods if method.key not in there]
    said = [f"method '{method.key}' names site '{getattr(method, 'site', '')}', whose expert is not there" for method in gone]
    if not there and not sent.federated:
        raise SiteError(f"{'; '.join(said)}: no row is left. Add a method of all experts, such as 'mean'; experts are in the pool")
    for line in said:
        terminal.say(f"  {line}; the run goes on without its row")


def usable(experiment: Experiment, experts: list[Expert]) -> tuple[Any, ...]:
    """The methods without those that name an expert which was left out."""
    there = {expert.site for expert in experts}
    gone = {site.name for site in experiment.sites} - there
    methods = tuple(method for method in experiment.scenario.methods if getattr(method, "site", None) not in gone)
    return under_stream(methods) if experiment.scenario.priors == "estimated" else methods


def _row(model: GlobalModel, initial: Initial) -> Federated:
    strategy = model.strategy
    theta = _arrays(model.stand.theta | initial.target_head)
    return Federated(strategy.key, strategy.paper, strategy.fields(), strategy.remark, theta)


def under_stream(methods: tuple[Any, ...]) -> tuple[Any, ...]:
    """The methods, with predictions under the stream's shares of labels where they have no prior of their own."""
    return tuple(one.model_copy(update={"label_prior": "stream"}) if one.label_prior == "none" else one for one in methods)


def contributions(experiment: Experiment, initial: Initial, experts: Sequence[Expert]) -> tuple[dict[str, Contribution], Arrays]:
    """Experts and theta_0 as they travel to the target, with heads under the prior that the scenario asks for.

    Where the target has classes of its own, each has the head that prompts make for them.
    """
    scenario, base = experiment.scenario, initial.weights if initial.known else {}
    if scenario.priors == "as_trained":
        return {one.site: contribution(one, initial.target_head) for one in experts}, _arrays(base | initial.target_head)
    bias = head_bias(build(scenario.model, len(experiment.classes), seed=scenario.seed))
    shares = experiment.target.prevalences if scenario.priors == "declared" else None
    target = torch.tensor([shares[name] for name in experiment.classes]).double() if shares else None
    there = (len(target) * target / target.sum()).log() if target is not None else None
    found = {}
    for expert in experts:
        counts = expert.statistics.get("class_counts")
        trained = log_shares(counts["counts"]) if counts else None
        found[expert.site] = contribution(replace(expert, weights=under_prior(expert.weights, bias, trained, there)))
    return found, _arrays(under_prior(base, bias, None, there) if base else {})


def contribution(expert: Expert, head: Mapping[str, Any] | None = None) -> Contribution:
    """An expert as it travels to the target, without the counts of its classes, which no method needs.

    head: that of the target's own classes, where these are others. All experts have it, so their statistics say nothing of it.
    """
    head, statistics = dict(head or {}), {}
    for kind, state in expert.statistics.items():
        own = {name: tensor if kind == "soup" else torch.zeros_like(tensor) for name, tensor in head.items() if name in state}
        if kind != "class_counts":
            statistics[kind] = _arrays(state | own)
    return Contribution(expert.site, _arrays(expert.weights | head), expert.n, expert.temperature, statistics)


def _arrays(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in state.items()}


def count_batches(site: Site, geometry: Geometry, schedule: Schedule, seed: int, classes: Sequence[str]) -> int:
    """Batches of the stream, counted in a process that is gone afterwards. Raises DataError if the images cannot be used."""
    with owners(1) as owner:
        return owner.submit(_count, site, geometry, schedule, seed, classes).result()


def _count(site: Site, geometry: Geometry, schedule: Schedule, seed: int, classes: Sequence[str]) -> int:
    loaded = site.source.load(geometry, site.name, seed).of_classes(classes)
    return len(Stream(Gallery(loaded, schedule.conditions(), site.name, seed), schedule, site.name, seed))


BATCHES_AT_A_TIME = 4
"""At most so many batches between two signs of life from the target, and between two snapshots."""

SIGN_S = 1.0
"""Batches that take longer than this, seconds, come one at a time: each is a sign of life, and is kept as soon as it is done."""


class Consumer(Protocol):
    """What the walk needs of a target."""

    def advance(self, batches: int) -> list[Step]: ...

    def change(self, names: Sequence[str], arriving: Sequence[Contribution] = ()) -> None: ...


def refuse_late_events(experiment: Experiment) -> None:
    """Raises ScenarioError if an event comes after the end of the stream, before anybody trains for it."""
    scenario = experiment.scenario
    if scenario.events:
        batches = count_batches(
            experiment.target, scenario.model.geometry, scenario.stream, scenario.seed, experiment.target_classes
        )
        if problems := past_end(scenario.events, batches, f"scenario '{scenario.name}'"):
            raise ScenarioError(problems)


def course_of(experiment: Experiment, there: Sequence[str]) -> list[Roster]:
    """Every set of experts with its first batch, of those hospitals that have sent one.

    Raises SiteError if at some batch none of them would be there.
    """
    missing = {site.name for site in experiment.sites} - set(there)
    course = rosters(experiment.founders, experiment.scenario.events, missing)
    for roster in course:
        if not roster.experts:
            raise SiteError(
                f"batch {roster.start}: found no expert left, without {', '.join(sorted(missing))}; expected at least one"
            )
    return course


def at_batch(course: Sequence[Roster], t: int) -> Roster:
    """Who is there at batch t."""
    return next(roster for roster in reversed(course) if roster.start <= t)


class Walk:
    """The way through a stream, from batch `done` on. there: whose experts the target has now."""

    def __init__(self, target: Consumer, course: Sequence[Roster], experts: Mapping[str, Contribution], terminal: Terminal) -> None:
        self.target, self.course, self.experts, self.terminal = target, course, experts, terminal
        self.there = course[0].experts
        self.done = 0
        self.at_a_time = 1

    def change(self, names: Sequence[str]) -> None:
        """Let the target have the experts of these names, if it has others."""
        if tuple(names) != self.there:
            self.target.change(list(names), [self.experts[name] for name in names if name not in self.there])
            self.there = tuple(names)

    def __iter__(self) -> Iterator[list[Step]]:
        """Steps of some batches at a time, with every change between the batches where it belongs."""
        while True:
            now = at_batch(self.course, self.done)
            if now.experts != self.there:
                self.change(now.experts)
                self.terminal.say(f"  before batch {now.start}: {now.change}")
            left = [roster.start - self.done for roster in self.course if roster.start > self.done]
            began = time.monotonic()
            steps = self.target.advance(min([self.at_a_time, *left]))
            if not steps:
                return
            batch_s = (time.monotonic() - began) / (steps[-1].t + 1 - self.done)
            self.at_a_time = min(BATCHES_AT_A_TIME, max(1, int(SIGN_S / max(batch_s, 1e-9))))
            self.done = steps[-1].t + 1
            yield steps
