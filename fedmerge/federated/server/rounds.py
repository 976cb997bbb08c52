"""What the server does in the rounds of a federated strategy: whom to ask, what to admit, and what to make of it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from torch import Tensor

from fedmerge.errors import FolderError, SiteError, UploadRefused
from fedmerge.federated.client.round import SCALARS
from fedmerge.federated.messages import Ask, Job, Request, SiteTask
from fedmerge.federated.pool.global_models import Absence, GlobalPool, Stand, Turn
from fedmerge.federated.security.audit import Declaration, Item, Upload
from fedmerge.federated.server.admission import admit, declared_statistics, refuse
from fedmerge.federated.strategies._aggregation import Aggregation
from fedmerge.federated.strategies._base import Strategy
from fedmerge.rng import generator


def unfinished(job: Job) -> list[Strategy]:
    """Strategies whose rounds are not all done."""
    pool = GlobalPool(job.pool, job.tasks)
    return [strategy for strategy in job.tasks[0].federated if not pool.has(strategy)]


def compete(job: Job, ask: Ask) -> dict[str, str]:
    """All rounds of every strategy, each from theta_0, or from the last round in the pool; why there is no model, by key."""
    failed = {}
    for strategy in unfinished(job):
        try:
            all_rounds(job, strategy, ask)
        except (SiteError, FolderError) as error:
            failed[strategy.key] = str(error)
    return failed


def all_rounds(job: Job, strategy: Strategy, ask: Ask) -> Stand:
    """One strategy to its end. Raises SiteError if too few hospitals answer a round; what was done before is in the pool."""
    pool = GlobalPool(job.pool, job.tasks)
    stand = pool.last(strategy) or Stand(0, dict(job.initial.weights), {}, ())
    aggregation = Aggregation(strategy, job.initial.weights)
    aggregation.recall(stand.memory)
    for number in range(stand.rounds + 1, strategy.rounds + 1):
        began = time.perf_counter()
        told = answers(job, strategy, number, stand.theta, ask)
        theta = aggregation.round(number, stand.theta, told.uploads)
        see_that_near(job, strategy, number, theta)
        seconds = stand.seconds + time.perf_counter() - began
        turns, absences = (*stand.turns, *told.turns), (*stand.absences, *told.absences)
        stand = Stand(number, theta, aggregation.memory(), turns, seconds, absences)
        pool.keep(strategy, stand, told.items)
    return stand


def see_that_near(job: Job, strategy: Strategy, number: int, theta: dict[str, Tensor]) -> None:
    """Raises SiteError where the server's own step has led beyond what hospitals may send: they could not go on from there."""
    if not strategy.own_key or not job.initial.known or job.tasks[0].privacy:
        return
    if why := job.limits.complaint(theta, job.initial.weights, job.initial.heads):
        raise SiteError(f"round {number}: the server's step is too long: {why}. Lower {strategy.own_key}")


@dataclass(frozen=True)
class RoundAnswers:
    """What hospitals have sent in a round and passed the gate, in their order; its audit; and who was asked in vain."""

    uploads: list[Upload]
    turns: list[Turn]
    items: list[Item]
    absences: list[Absence]


def asked_in(job: Job, strategy: Strategy, number: int) -> list[SiteTask]:
    """The hospitals of one round: all, or as many as the fraction says, drawn by seed, strategy and round; in their order.

    By all that the strategy is but its label: what the pool takes for the same must be the same.
    """
    count = strategy.chosen(len(job.tasks))
    same = json.dumps(strategy.fields(), sort_keys=True)
    drawn = generator(job.tasks[0].seed, "round", same, number).permutation(len(job.tasks))[:count]
    return [job.tasks[index] for index in sorted(drawn.tolist())]


def answers(job: Job, strategy: Strategy, number: int, theta: dict[str, Tensor], ask: Ask) -> RoundAnswers:
    """One round of messages. Raises SiteError if some hospitals' answers are missing.

    Where the job says how many are enough, so many are, but never fewer than the strategy needs.
    """
    tasks = [task.model_copy(update={"uploads": strategy.statistics}) for task in asked_in(job, strategy, number)]
    waiting = {task.site.name: Request("round", task, theta, (strategy.key, str(number))) for task in tasks}
    arrived: dict[str, tuple[Upload, Turn, list[Item]]] = {}
    failed: dict[str, str] = {}
    for reply in ask(list(waiting.values()), job.deadline_s):
        site = reply.task.site.name
        request = waiting.pop(site, None)
        if request is None:
            refuse(job, site, f"{strategy.key}: an answer to no question", reply.upload)
        elif reply.upload is None and not reply.refused:
            failed[site] = reply.reason
        else:
            try:
                items = admit(reply, request, declared(strategy, request.task, theta), job)
            except UploadRefused as refusal:
                failed[site] = f"its upload was refused: {refusal}"
                continue
            assert reply.upload is not None
            arrived[site] = reply.upload, turn(reply.upload, number, items, theta), items
    failed |= dict.fromkeys(waiting, job.silence)
    enough = max(min(job.at_least or len(tasks), len(tasks)), strategy.least)
    if len(arrived) < enough:
        told = "; ".join(f"site '{site}': {reason}" for site, reason in failed.items())
        found = f"round {number}: found {len(arrived)} answers; expected at least {enough}"
        raise SiteError(f"{found}{': ' + told if told else ''}")
    there = [arrived[task.site.name] for task in tasks if task.site.name in arrived]
    items = [item for _, _, sent in there for item in sent]
    absences = [Absence(number, site, reason) for site, reason in failed.items()]
    return RoundAnswers([upload for upload, _, _ in there], [own for _, own, _ in there], items, absences)


def declared(strategy: Strategy, task: SiteTask, theta: dict[str, Tensor]) -> Declaration:
    """What a hospital may send in a round."""
    arrays = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in theta.items()}
    return Declaration(task.site.name, arrays, SCALARS, statistics=declared_statistics(task, strategy.statistics))


def turn(upload: Upload, number: int, items: list[Item], theta: dict[str, Tensor]) -> Turn:
    """The ledger's line of an upload."""
    said = upload.scalars
    down = sum(tensor.numel() * tensor.element_size() for tensor in theta.values())
    up = sum(item.bytes for item in items if item.kind != "statement")
    return Turn(number, upload.site, int(said["n"]), int(said["steps"]), up, down, said["validation_accuracy"])
