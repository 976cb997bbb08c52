"""What the server does with hospitals, whatever carries the messages: whom to ask, what to admit, what to report."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedmerge.errors import SiteError, UploadRefused
from fedmerge.federated.client.linear_probe import ROUNDS, LinearProbe
from fedmerge.federated.messages import Ask, Initial, Job, Outcome, Reply, Request, SiteTask
from fedmerge.federated.pool.experts import ExpertPool
from fedmerge.federated.pool.statistics import StatisticPool
from fedmerge.federated.security.audit import Declaration, state_digest
from fedmerge.federated.server.admission import admit, declared_statistics, refuse
from fedmerge.federated.server.statistics import gather_statistics


def incomplete(job: Job) -> list[SiteTask]:
    """The sites that have to be asked something."""
    return StatisticPool(ExpertPool(job.pool), job.tasks).incomplete()


def collect(job: Job, ask: Ask) -> dict[str, Outcome]:
    """Ask every site whose expert is not in the pool, and admit what arrives. One site's failure costs no other its expert.

    When all experts are there, or as many as are enough, ask those sites for the statistics that are not.
    """
    pool = ExpertPool(job.pool)
    missing = [task for task in job.tasks if not pool.has(task)]
    asked = {task.site.name: Request("train", task, job.initial.weights) for task in missing}
    outcomes = {task.site.name: Outcome(task.site.name, False) for task in job.tasks if task.site.name not in asked}
    for reply in ask(list(asked.values()), job.deadline_s) if missing else ():
        name = reply.task.site.name
        if name in asked:
            outcomes[name] = _admit(reply, asked.pop(name), job, pool)
        else:
            refuse(job, name, f"site '{name}': an answer to no question: it has answered before, or was not asked", reply.upload)
        del reply  # its weights need not be held while the next ones are read
    for task in missing:
        outcomes.setdefault(task.site.name, Outcome(task.site.name, False, job.silence))
    while len(there := [t for t in job.tasks if not outcomes[t.site.name].reason]) >= (job.at_least or len(job.tasks)):
        failed = gather_statistics(replace(job, tasks=tuple(there)), ask)
        if not failed:
            break
        for name, reason in failed.items():  # without it the others may be asked again: some statistics depend on all of them
            outcomes[name] = replace(outcomes[name], reason=reason)
    return outcomes


def probe_head(job: Job, ask: Ask) -> Initial:
    """theta_0 with a head from federated linear probing: the encoder is frozen, and the sites' heads are averaged by n_k.

    Raises SiteError if a site fails: every founding site has a say in the head that all of them start from.
    """
    weights = dict(job.initial.weights)
    for _ in range(ROUNDS):
        heads: list[tuple[float, dict[str, Tensor]]] = []
        start = dict(weights)
        asked = {task.site.name: Request("probe", task, start) for task in job.tasks}
        for reply in ask(list(asked.values()), job.deadline_s):
            name = reply.task.site.name
            if reply.upload is None:
                raise SiteError(f"site '{name}': linear probing: {reply.reason}")
            if name not in asked:
                raise SiteError(f"site '{name}': linear probing: found a second answer in one round; expected one")
            admit(reply, asked.pop(name), LinearProbe.declaration(name, reply.upload, weights), job)
            heads.append((reply.upload.scalars["n"], reply.upload.weights))
        if len(heads) < len(job.tasks):
            raise SiteError(f"linear probing: found {len(heads)} answers within {job.deadline_s:g} s; expected {len(job.tasks)}")
        total = sum(n for n, _ in heads)
        for name in heads[0][1]:
            weights[name] = torch.stack([n / total * head[name] for n, head in heads]).sum(0)
    return replace(job.initial, weights=weights, sha256=state_digest(weights))


def declaration(task: SiteTask, weights: dict[str, Tensor]) -> Declaration:
    """What the site of a task may send."""
    size, channels = task.model.geometry
    expert = Declaration.of(task.site.name, weights, task.runs, task.site.samples, (size, size, channels))
    if task.privacy:
        return replace(expert, scalars=frozenset())
    asked = [statistic for statistic in task.uploads if statistic.starts_from != "rounds"]
    return replace(expert, statistics=declared_statistics(task, asked))


def _admit(reply: Reply, request: Request, job: Job, pool: ExpertPool) -> Outcome:
    task, name = request.task, request.task.site.name
    if reply.upload is None and not reply.refused:
        return Outcome(name, False, reply.reason)
    try:
        items = admit(reply, request, declaration(task, job.initial.weights), job, pool)
    except UploadRefused as refusal:
        return Outcome(name, False, f"its upload was refused: {refusal}")
    assert reply.upload is not None
    kinds = {statistic.kind(): statistic for statistic in task.uploads}
    pool.add(task, reply.upload, [item for item in items if item.kind not in kinds], reply.seconds)
    known = StatisticPool(pool, job.tasks)
    for kind, state in reply.upload.statistics.items():
        own, digest = [item for item in items if item.kind == kind], reply.upload.statistics_sha256[kind]
        known.add(task, kinds[kind], state, own, [reply.upload.seal], digest)
    return Outcome(name, task.runs > 0)
