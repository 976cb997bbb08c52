"""What the server does about statistics that the scenario asks for: whom to ask, what to admit, and what to merge where
they come in rounds, so that each site can be sent the next model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedmerge.errors import UploadRefused
from fedmerge.federated.client.site_training import model_of
from fedmerge.federated.messages import Ask, Job, Request, SiteTask
from fedmerge.federated.pool.experts import ExpertPool
from fedmerge.federated.pool.statistics import StatisticPool
from fedmerge.federated.security.audit import Declaration, DeclaredStatistic, Item, Seal
from fedmerge.federated.server.admission import admit, refuse
from fedmerge.federated.statistics._base import State, Statistic
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.curvature.gram import linear_layers, merge_layers


@dataclass(frozen=True)
class Record:
    """How a statistic came: lines of the audit, and what the site has signed, once for each message; the last one's digest."""

    items: list[Item] = field(default_factory=list)
    seals: list[Seal] = field(default_factory=list)
    digest: str = ""


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
            known.add(task, statistic, state, record.items, record.seals, record.digest)
    return failed


def in_rounds(job: Job, statistic: Statistic, lacking: list[SiteTask], ask: Ask) -> dict[str, str]:
    """One message for each site and block of layers; between them the server merges a block."""
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
        record = Record(items, [reply.upload.seal], reply.upload.statistics_sha256[kind])
        yield task, reply.upload.statistics[kind], record, ""
    for request in waiting.values():
        yield request.task, {}, Record(), f"{kind}: {job.silence}"


Block = tuple[str, tuple[str, ...]]
"""A prefix of names, e.g. "blocks.3", and the linear weights below it."""


class Rounds:
    """The server's side: K experts (states), a model that they fit, and an image's shape (channels, H, W)."""

    def __init__(self, model: nn.Module, experts: Sequence[State], image: tuple[int, ...], ratio: float, ridge: float) -> None:
        self.bank = Bank.of(model, experts)
        self.experts, self.ratio, self.ridge = experts, ratio, ridge
        self.blocks = blocks(model.eval(), image)
        self.theta = self.bank.theta.mean(0)

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], list[State]]]:
        """For each round its linear weights, and one state for each site: merged up to the block, the site's own from there on."""
        for number, (_, layers) in enumerate(self.blocks):
            own = tuple(f"{prefix}." for prefix, _ in self.blocks[number:])
            merged = self.bank.state_dict(self.theta)
            yield layers, [{n: expert[n] if n.startswith(own) else merged[n] for n in expert} for expert in self.experts]

    def merge(self, G: Sequence[Mapping[str, Tensor]]) -> None:
        """End a round: merge its block with what K sites have sent."""
        stacked = {name: torch.stack([one[name] for one in G]) for name in G[0]}
        merge_layers(self.theta, self.bank, stacked, self.ratio, self.ridge)


@torch.no_grad()
def blocks(model: nn.Module, image: tuple[int, ...]) -> list[Block]:
    """Linear weights in the order in which they act, grouped by their names up to the last number: "blocks.3.mlp.fc1.weight" is of
    "blocks.3", "head.weight" of "head"."""
    order: list[str] = []
    layers = linear_layers(model)
    hooks = [layer.register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name, layer in layers.items()]
    model(torch.zeros(1, *image).to(next(model.parameters())))
    for hook in hooks:
        hook.remove()
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(order):
        found.setdefault(_prefix(name), []).append(name)
    return [(prefix, tuple(names)) for prefix, names in found.items()]


def _prefix(name: str) -> str:
    parts = name.split(".")[:-1]
    numbers = [position for position, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1] if numbers else parts)
