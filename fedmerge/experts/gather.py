"""What the coordinator does with hospitals, whatever carries the messages: whom to ask, what to admit, what to report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fedmerge.errors import SiteError, UploadRefused
from fedmerge.experts.initialisation import Initial
from fedmerge.experts.pool import ExpertPool
from fedmerge.experts.probe import ROUNDS, Probe
from fedmerge.experts.train import SiteTask
from fedmerge.experts.upload import Declaration, Upload, inspect, state_digest, write_audit

START_GRACE_S = 120.0
"""What the carriers of messages may take to start and to stop, on top of the hospitals' deadline, seconds."""


@dataclass(frozen=True)
class Tick:
    """Progress of one site: steps done, steps in all, a few words. Nothing else is told before the upload."""

    site: str
    done: int
    total: int
    text: str


@dataclass(frozen=True)
class Outcome:
    """How asking one site ended. trained: it trained now. reason: why there is no expert, or empty."""

    site: str
    trained: bool
    reason: str = ""


@dataclass(frozen=True)
class Reply:
    """One site's answer: an upload, or the reason why there is none. seconds: since it was asked."""

    task: SiteTask
    upload: Upload | None
    reason: str
    seconds: float


Ask = Callable[[str, Sequence[SiteTask], dict[str, Tensor], float], Iterator[Reply]]
"""(what, whom, weights to start from, deadline in seconds) -> replies as they arrive. what: "train" or "probe"."""


@dataclass(frozen=True)
class Job:
    """What is to be gathered, and where it goes."""

    tasks: tuple[SiteTask, ...]
    initial: Initial
    pool: Path
    audit: Path
    deadline_s: float


def collect(job: Job, ask: Ask) -> dict[str, Outcome]:
    """Ask every site whose expert is not in the pool, and admit what arrives. One site's failure costs no other its expert."""
    pool = ExpertPool(job.pool)
    missing = [task for task in job.tasks if not pool.has(task)]
    outcomes = {task.site.name: Outcome(task.site.name, False) for task in job.tasks if task not in missing}
    for reply in ask("train", missing, job.initial.weights, job.deadline_s) if missing else ():
        outcomes[reply.task.site.name] = _admit(reply, job, pool)
    for task in missing:
        silent = f"did not answer within {job.deadline_s:g} s"
        outcomes.setdefault(task.site.name, Outcome(task.site.name, False, silent))
    return outcomes


def probe_head(job: Job, ask: Ask) -> Initial:
    """theta_0 with a head from federated linear probing: the encoder is frozen, and the sites' heads are averaged by n_k.

    Raises SiteError if a site fails: every founding site has a say in the head that all of them start from.
    """
    weights = dict(job.initial.weights)
    for _ in range(ROUNDS):
        heads: list[tuple[float, dict[str, Tensor]]] = []
        for reply in ask("probe", job.tasks, weights, job.deadline_s):
            if reply.upload is None:
                raise SiteError(f"site '{reply.task.site.name}': linear probing: {reply.reason}")
            declared = Probe.declaration(reply.task.site.name, reply.upload, weights)
            write_audit(job.audit, inspect(reply.upload, declared))
            heads.append((reply.upload.scalars["n"], reply.upload.weights))
        if len(heads) < len(job.tasks):
            raise SiteError(f"linear probing: {len(heads)} of {len(job.tasks)} sites answered within {job.deadline_s:g} s")
        total = sum(n for n, _ in heads)
        for name in heads[0][1]:
            weights[name] = torch.stack([n / total * head[name] for n, head in heads]).sum(0)
    return replace(job.initial, weights=weights, sha256=state_digest(weights))


def declaration(task: SiteTask, weights: dict[str, Tensor]) -> Declaration:
    """What the site of a task may send."""
    size, channels = task.model.geometry
    return Declaration.of(task.site.name, weights, task.training.runs, task.site.samples, (size, size, channels))


def _admit(reply: Reply, job: Job, pool: ExpertPool) -> Outcome:
    name = reply.task.site.name
    if reply.upload is None:
        return Outcome(name, False, reply.reason)
    try:
        items = inspect(reply.upload, declaration(reply.task, job.initial.weights))
    except UploadRefused as refusal:
        return Outcome(name, False, f"its upload was refused: {refusal}")
    write_audit(job.audit, items)
    pool.add(reply.task, reply.upload, items, reply.seconds)
    return Outcome(name, True)
