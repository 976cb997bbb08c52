"""The target site as a Ray actor, on a GPU if Ray has one, and on the machine that a cluster declares to be the target's.

The actor takes no CPU out of Ray's count: it would starve clients that count the same CPUs. Every wait has a deadline.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from fedmerge.adaptation.ray.cluster import nodes, started_ray
from fedmerge.adaptation.ray.placement import Wanted
from fedmerge.adaptation.ray.restart import Revival
from fedmerge.adaptation.ray.shards import ShardActors
from fedmerge.adaptation.ray.waiting import START_DEADLINE_S, wait
from fedmerge.adaptation.tasks import Arrays, Contribution, Description, TargetTask
from fedmerge.adaptation.worker import Host
from fedmerge.errors import ScenarioError, TargetError
from fedmerge.report.batch_log import Step
from fedmerge.stream.stream import Answers

PATIENCE = 20.0
"""A batch may take so many times as long as the slowest before it, whatever the deadline: the machine may have got other work."""

LOST_S = 60.0
"""How long a cluster may be without a place for the target before the run ends, seconds; a node may come back."""


class Placed(Host):
    """The target's process, which can tell where it is."""

    def node(self) -> str:
        """Ray's name of the node."""
        import ray

        return str(ray.get_runtime_context().get_node_id())


class RemoteTarget:
    """A `TargetSite` in an actor of its own, with the same calls. Use it as a context: what it started ends with it.

    restarts: how often the actor may die; Ray then starts it again, it gets its experts and its last snapshot again, and goes on as
    if nothing had happened. `revival.deaths` holds the batches done at each. `RAY_ADDRESS` connects to an existing cluster, which
    is left running. Raises TargetError if the actor dies once more or a deadline passes, and whatever user's error the site raises.
    """

    def __init__(
        self, task: TargetTask, experts: Sequence[Contribution], base: Arrays, deadline_s: float, restarts: int = 0
    ) -> None:
        self.task, self.base, self.deadline_s = task, base, deadline_s
        self.revival = Revival(restarts, START_DEADLINE_S, self._open, lambda: self._snapshot["position"] if self._snapshot else 0)
        self._there = list(experts)
        self._snapshot: dict[str, Any] | None = None
        self._actor: Any = None
        self._shards = ShardActors(task, base, deadline_s)
        self._wanted = Wanted(task.gpus, task.resource, task.shards)
        self._lost: float | None = None
        self._slowest_s = 0.0

    def __enter__(self) -> Self:
        import ray

        self._ray = started_ray(ray)
        self._ray.__enter__()
        try:
            place = self._wanted.place(nodes(ray))
            self._wanted = self._wanted.at(place)
            options = {"max_restarts": self.revival.most, "enable_task_events": False}
            self._actor = ray.remote(Placed).options(**place.target, **options).remote()
            self.revival.surely(self._open)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        import ray

        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None
        self._shards.end()
        self._ray.__exit__(None, None, None)

    def _hand_over(self, experts: Sequence[Contribution]) -> None:
        """The experts one at a time, so that neither Ray's object store nor the actor holds more than one beside the bank."""
        actor = self._actor
        shards = self._shards.hold(experts, self._at_shards()) if self.task.shards > 1 else None
        begun = actor.begin.remote(self.task, self.base, len(experts), shards)
        wait(begun, "the target to load its images", START_DEADLINE_S)
        for expert in experts:
            brought = self._shards.left(expert) if shards else expert
            wait(actor.admit.remote(brought), f"the target to take the expert of '{expert.site}'", START_DEADLINE_S)

    def _at_shards(self) -> dict[str, Any]:
        """Options for shards: where the cluster has a place for them, or where the target is now."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        apart = self._wanted.place(nodes(ray)).shard
        if apart is not None:
            return apart
        here = wait(self._actor.node.remote(), "the target's node", START_DEADLINE_S)
        return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}

    def describe(self) -> Description:
        """The stream and the rows of the table."""
        return self._call("describe")  # type: ignore[no-any-return]

    def advance(self, batches: int) -> list[Step]:
        """Every method's step on each of the next batches; empty when the stream is over."""
        steps: list[Step]
        steps, self._snapshot = self.revival.surely(lambda: self._advanced(batches))
        return steps

    def _advanced(self, batches: int) -> Any:
        """The first batch has the whole deadline to itself, and tells how long the next may take."""
        began = time.monotonic()
        answer = self._ask("advance", batches, deadline_s=max(self.deadline_s, PATIENCE * self._slowest_s * batches))
        self._slowest_s = max(self._slowest_s, (time.monotonic() - began) / batches)
        return answer

    def change(self, names: Sequence[str], arriving: Sequence[Contribution] = ()) -> None:
        """Go on with the experts of these names, in this order; those who are not there yet are among the arriving."""
        known = {expert.site: expert for expert in [*self._there, *arriving]}
        there = [known[name] for name in names]
        self._snapshot = self.revival.surely(lambda: self._changed(there))
        self._there = there

    def _changed(self, there: Sequence[Contribution]) -> dict[str, Any]:
        self._hand_over(there)
        return copy.deepcopy(wait(self._actor.change.remote(), "the target to merge its experts", self._longest))

    def answers(self) -> Answers:
        """Labels and domains of the whole stream, for the report."""
        return self._call("answers")  # type: ignore[no-any-return]

    def disputed(self, places: Sequence[int]) -> Any:
        """Images that its file grants to show."""
        return self._call("disputed", places)

    def snapshot(self) -> dict[str, Any]:
        """The position and every method's state after the last change of either."""
        return self._snapshot or self._call("snapshot")

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go on from a snapshot."""
        self._call("restore", snapshot)
        self._snapshot = snapshot

    def forwards_so_far(self) -> int:
        """Forwards through one model that were really run."""
        return self._call("forwards_so_far")  # type: ignore[no-any-return]

    def per_sample_ways(self) -> dict[str, Any]:
        """How rows of coefficients were merged, for the manifest."""
        return self._call("per_sample_ways")  # type: ignore[no-any-return]

    def process(self) -> int:
        """Number of the actor's process on its node, to look at it or to end it."""
        return wait(self._actor.process.remote(), "the target's process number", self.deadline_s)  # type: ignore[no-any-return]

    @property
    def deaths(self) -> list[int]:
        """Batches done at each death of the actor."""
        return self.revival.deaths

    def _call(self, name: str, *arguments: Any) -> Any:
        return self.revival.surely(lambda: self._ask(name, *arguments))[0]

    def _ask(self, name: str, *arguments: Any, deadline_s: float | None = None) -> Any:
        """A copy: arrays in Ray's shared memory are overwritten once this process has left a cluster that stays."""
        called = self._actor.call.remote(name, *arguments)
        return copy.deepcopy(wait(called, f"the target's answer to '{name}'", deadline_s or self.deadline_s))

    def _open(self) -> None:
        """Give the actor its task, its experts, and where it stood, if it stood anywhere."""
        self._see_to_a_place()
        wait(self._actor.process.remote(), "the target's actor to start", START_DEADLINE_S)
        self._hand_over(self._there)
        wait(self._actor.open.remote(self._snapshot), "the target to merge its experts", self._longest)

    def _see_to_a_place(self) -> None:
        """Raises TargetError if the cluster has been without a place for the target for too long, as when its node is lost."""
        import ray

        try:
            self._wanted.place(nodes(ray))
            self._lost = None
        except ScenarioError as error:
            self._lost = self._lost or time.monotonic()
            if time.monotonic() - self._lost > LOST_S:
                lacking = "; ".join(str(problem) for problem in error.problems)
                kept = "What is done is kept: start such a node again, and give the same command with --resume"
                raise TargetError(f"the cluster has lost the target's place for {LOST_S:g} s: {lacking}. {kept}") from None

    @property
    def _longest(self) -> float:
        return max(START_DEADLINE_S, self.deadline_s)
