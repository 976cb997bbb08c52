"""Shards of the target's bank as actors: each holds some of the experts, and the target's actor asks them directly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.adaptation.ray.restart import Died
from fedmerge.adaptation.ray.waiting import START_DEADLINE_S, wait
from fedmerge.adaptation.shard import Shard, ShardTask, divided
from fedmerge.adaptation.tasks import Arrays, Contribution, TargetTask
from fedmerge.federated.client.site_log import discreet
from fedmerge.federated.model import build
from fedmerge.merging.bank.layout import Parts

WHO = "a shard of the experts' bank"


class ShardHost(Shard):
    """A shard in its own process: what it is asked and what it answers travel as numpy arrays."""

    def begin(self, task: ShardTask, base: Arrays, experts: int) -> None:
        """As of `Shard`."""
        self.site = task.site
        with discreet(task.site):
            super().begin(task, base, experts)

    def admit(self, expert: Contribution) -> None:
        """As of `Shard`."""
        with discreet(self.site):
            super().admit(expert)

    def serve(self, what: str, arguments: Sequence[Any]) -> NDArray[Any]:
        """As `answer` of `Shard`."""
        with discreet(self.site):
            return self.answer(what, [_tensor(one) for one in arguments]).numpy()


@dataclass(frozen=True)
class RemoteShards:
    """What the target's process knows of its shards. experts: how many each has."""

    actors: tuple[Any, ...]
    experts: tuple[int, ...]
    deadline_s: float

    def ask(self, what: str, arguments: Sequence[Sequence[Any] | None]) -> list[Tensor]:
        """All at the same time; what is the same for several is put into Ray's store once. Raises Died if one of them is gone."""
        import ray

        asked, shared = [given for given in arguments if given is not None], dict[int, Any]()
        for given in asked:
            if id(given) not in shared:
                plain = [_plain(one) for one in given]
                shared[id(given)] = ray.put(plain) if sum(other is given for other in asked) > 1 else plain
        references = [
            actor.serve.remote(what, shared[id(given)])
            for actor, given in zip(self.actors, arguments, strict=True)
            if given is not None
        ]
        found = wait(references, f"the experts' answer to '{what}'", self.deadline_s, WHO, replaced=True)
        return [_tensor(one) for one in found]


class ShardActors:
    """The driver's side: it starts shards, gives them their experts, and starts them anew where they have died."""

    def __init__(self, task: TargetTask, base: Arrays, deadline_s: float) -> None:
        self.task, self.base, self.deadline_s = task, base, deadline_s
        self.actors: list[Any] = []
        self._beside: tuple[str, ...] | None = None

    def hold(self, experts: Sequence[Contribution], options: dict[str, Any]) -> RemoteShards:
        """Each shard takes its part of the experts, one at a time. options: for Ray, where shards go. Raises Died."""
        groups = divided(experts, self.task.shards)
        self._see_to(len(groups), options)
        actors = self.actors[: len(groups)]
        task = ShardTask.of(self.task, max(1, self.task.threads // len(groups)))
        began = [actor.begin.remote(task, self.base, len(group)) for actor, group in zip(actors, groups, strict=True)]
        wait(began, "the shards to begin", START_DEADLINE_S, WHO, replaced=True)
        for wave in zip_longest(*groups):
            came = [(actor, one) for actor, one in zip(actors, wave, strict=True) if one is not None]
            taken = [actor.admit.remote(replace(one, statistics={})) for actor, one in came]
            names = ", ".join(f"'{one.site}'" for _, one in came)
            wait(taken, f"shards to take the experts of {names}", START_DEADLINE_S, WHO, replaced=True)
        return RemoteShards(tuple(actors), tuple(len(group) for group in groups), self.deadline_s)

    def left(self, expert: Contribution) -> Contribution:
        """What the target is sent of an expert that a shard has: buffers, counts, temperature, statistics."""
        if self._beside is None:
            self._beside = Parts.of(build(self.task.model, len(self.task.classes), seed=self.task.seed)).beside
        return replace(expert, weights={name: expert.weights[name] for name in self._beside})

    def end(self) -> None:
        """Every shard's process ends."""
        import ray

        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

    def _see_to(self, count: int, options: dict[str, Any]) -> None:
        """As many that are alive."""
        import ray

        alive = []
        for actor in self.actors:
            try:
                wait(actor.process.remote(), "a shard's sign of life", START_DEADLINE_S, WHO, replaced=True)
                alive.append(actor)
            except Died:
                ray.kill(actor)
        create = ray.remote(ShardHost).options(max_restarts=0, enable_task_events=False, **options)
        self.actors = alive + [create.remote() for _ in range(count - len(alive))]
        wait([actor.process.remote() for actor in self.actors], "the shards to start", START_DEADLINE_S, WHO, replaced=True)


def _plain(given: Any) -> Any:
    return given.detach().cpu().numpy() if isinstance(given, Tensor) else given


def _tensor(given: Any) -> Any:
    """A copy: what comes from Ray's store may not be written to."""
    return torch.from_numpy(np.array(given)) if isinstance(given, np.ndarray) else given
