"""What the coordinator does about statistics that the scenario asks for: whom to ask, in which rounds, what to admit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from fedmerge.errors import UploadRefused
from fedmerge.experts.admission import admit, refuse
from fedmerge.experts.asking import Ask, Job, Request
from fedmerge.experts.backbone import build
from fedmerge.experts.pool import ExpertPool
from fedmerge.experts.rounds import Rounds
from fedmerge.experts.statistic import Statistic
from fedmerge.experts.statistic_pool import StatisticPool
from fedmerge.experts.train import SiteTask
from fedmerge.experts.upload import Declaration, DeclaredStatistic, Item, Seal


@dataclass(frozen=True)
class Record:
    """How a statistic came: lines of the audit, and what the site has signed, once for each message."""

    items: list[Item] = field(default_factory=list)
    seals: list[Seal] = field(default_factory=list)


def gather_statistics(job: Job, ask: Ask) -> dict[str, str]:
    """Ask for the statistics that are not in the pool, and admit them; the reason for each site that failed."""
    known = StatisticPool(ExpertPool(job.pool), job.tasks)
    for statistic in job.tasks[0].uploads:
        lacking = known.lacking(statistic)
        if not lacking:
            continue
        gather = in_rounds if statistic.starts_from == "rounds" else at_once
        if failed := gather(job, statistic, lacking, ask):
            return failed
    return {}


def at_once(job: Job, statistic: Statistic, lacking: list[SiteTask], ask: Ask) -> dict[str, str]:
    """One message for each site without it, with the site's own expert or theta_0."""
    pool = ExpertPool(job.pool)
    known = StatisticPool(pool, job.tasks)
    given = {t.site.name: job.initial.weights if statistic.starts_from == "theta_0" else pool.load(t).weights for t in lacking}
    requests = [Request(statistic.kind(), task, given[task.site.name]) for task in lacking]
    failed: dict[str, str] = {}
    for task, state, record, reason in _measured(job, statistic, requests, ask):
        if reason:
            failed[task.site.name] = reason
        else:
            known.add(task, statistic, state, record.items, record.seals)
    return failed


def in_rounds(job: Job, statistic: Statistic, lacking: list[SiteTask], ask: Ask) -> dict[str, str]:
    """One message for each site and block of layers; between them the coordinator merges a block."""
    pool = ExpertPool(job.pool)
    known = StatisticPool(pool, job.tasks)
    size, channels = lacking[0].model.geometry
    experts = [pool.load(task).weights for task in lacking]
    fields = statistic.model_dump()
    rounds = Rounds(model_of(lacking[0]), experts, (channels, size, size), fields["ratio"], fields["ridge"])
    whole: dict[str, tuple[dict[str, Tensor], Record]] = {task.site.name: ({}, Record()) for task in lacking}
    for layers, states in rounds:
        requests = [Request(statistic.kind(), task, state, layers) for task, state in zip(lacking, states, strict=True)]
        arrived: dict[str, dict[str, Tensor]] = {}
        for task, state, record, reason in _measured(job, statistic, requests, ask):
            if reason:
                return {task.site.name: reason}
            arrived[task.site.name] = state
            whole[task.site.name][0].update(state)
            whole[task.site.name][1].items.extend(record.items)
            whole[task.site.name][1].seals.extend(record.seals)
        rounds.merge([arrived[task.site.name] for task in lacking])
    for task in lacking:
        state, record = whole[task.site.name]
        known.add(task, statistic, state, record.items, record.seals)
    return {}


def _measured(
    job: Job, statistic: Statistic, requests: list[Request], ask: Ask
) -> Iterator[tuple[SiteTask, dict[str, Tensor], Record, str]]:
    """For each request its site, what it sent, how that came, or else the reason why there is nothing."""
    kind = statistic.kind()
    shapes = statistic.layout(model_of(requests[0].task))
    shapes = {name: shape for name, shape in shapes.items() if not requests[0].layers or name in requests[0].layers}
    waiting = {request.task.site.name: request for request in requests}
    for reply in ask(requests, job.deadline_s):
        request = waiting.pop(reply.task.site.name, None)
        if request is None:
            refuse(job, reply.task.site.name, f"{kind}: an answer to no question", reply.upload)
            continue
        task = request.task
        if reply.upload is None and not reply.refused:
            yield task, {}, Record(), f"{kind}: {reply.reason}"
            continue
        declared = Declaration(task.site.name, {}, frozenset(), statistics={kind: DeclaredStatistic(shapes, statistic.refuses)})
        try:
            items = admit(reply, request, declared, job)
        except UploadRefused as refusal:
            yield task, {}, Record(), f"its upload was refused: {refusal}"
            continue
        assert reply.upload is not None
        yield task, reply.upload.statistics[kind], Record(items, [reply.upload.seal]), ""
    for request in waiting.values():
        yield request.task, {}, Record(), f"{kind}: {job.silence}"


def model_of(task: SiteTask) -> nn.Module:
    """A model that the expert of a task fits."""
    return build(task.model, len(task.classes), seed=task.seed)
