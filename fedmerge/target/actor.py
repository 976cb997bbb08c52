"""The Ray seam: the target site as a Ray actor, on a GPU if Ray has one. No other file names ray.

The actor takes no CPU out of Ray's count: it would starve clients that count the same CPUs. Every wait has a deadline.
"""

from __future__ import annotations

import copy
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, Self

from fedmerge.egress import sealed
from fedmerge.errors import FedmergeError, TargetError
from fedmerge.report.step import Step
from fedmerge.stream.stream import Answers
from fedmerge.target.host import Host
from fedmerge.target.revival import Died, Revival
from fedmerge.target.task import Arrays, Contribution, Description, TargetTask

START_DEADLINE_S = 600.0
"""Longest wait for the actor to start and load its images, and for each expert, seconds; a busy machine takes minutes."""

START_ATTEMPTS = 3
"""How often Ray is started before that counts as a failure."""


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

    def __enter__(self) -> Self:
        import ray

        _start(ray)
        try:
            gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
            options = {"max_restarts": self.revival.most, "enable_task_events": False}
            self._actor = ray.remote(Host).options(num_cpus=0, num_gpus=gpus, **options).remote()
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
        ray.shutdown()

    def _hand_over(self, experts: Sequence[Contribution]) -> None:
        """The experts one at a time, so that neither Ray's object store nor the actor holds more than one beside the bank."""
        actor = self._actor
        begun = actor.begin.remote(self.task, self.base, len(experts))
        self._wait(begun, "the target to load its images", START_DEADLINE_S)
        for expert in experts:
            self._wait(actor.admit.remote(expert), f"the target to take the expert of '{expert.site}'", START_DEADLINE_S)

    def describe(self) -> Description:
        """The stream and the rows of the table."""
        return self._call("describe")  # type: ignore[no-any-return]

    def advance(self, batches: int) -> list[Step]:
        """Every method's step on each of the next batches; empty when the stream is over."""
        steps: list[Step]
        steps, self._snapshot = self.revival.surely(lambda: self._ask("advance", batches))
        return steps

    def change(self, names: Sequence[str], arriving: Sequence[Contribution] = ()) -> None:
        """Go on with the experts of these names, in this order; those who are not there yet are among the arriving."""
        known = {expert.site: expert for expert in [*self._there, *arriving]}
        there = [known[name] for name in names]
        self._snapshot = self.revival.surely(lambda: self._changed(there))
        self._there = there

    def _changed(self, there: Sequence[Contribution]) -> dict[str, Any]:
        self._hand_over(there)
        return copy.deepcopy(self._wait(self._actor.change.remote(), "the target to merge its experts", self._longest))

    def answers(self) -> Answers:
        """Labels and domains of the whole stream, for the report."""
        return self._call("answers")  # type: ignore[no-any-return]

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
        return self._wait(self._actor.process.remote(), "the target's process number", self.deadline_s)  # type: ignore[no-any-return]

    def _call(self, name: str, *arguments: Any) -> Any:
        return self.revival.surely(lambda: self._ask(name, *arguments))[0]

    def _ask(self, name: str, *arguments: Any) -> Any:
        """A copy: arrays in Ray's shared memory are overwritten once this process has left a cluster that stays."""
        return copy.deepcopy(
            self._wait(self._actor.call.remote(name, *arguments), f"the target's answer to '{name}'", self.deadline_s)
        )

    def _open(self) -> None:
        """Give the actor its task, its experts, and where it stood, if it stood anywhere."""
        self._wait(self._actor.process.remote(), "the target's actor to start", START_DEADLINE_S)
        self._hand_over(self._there)
        self._wait(self._actor.open.remote(self._snapshot), "the target to merge its experts", self._longest)

    @property
    def _longest(self) -> float:
        return max(START_DEADLINE_S, self.deadline_s)

    def _wait(self, reference: Any, what: str, deadline_s: float) -> Any:
        """ray.get with a deadline, and Ray's errors as ours."""
        import ray

        try:
            return ray.get(reference, timeout=deadline_s)
        except ray.exceptions.GetTimeoutError:
            raise TargetError(f"waited {deadline_s:g} s for {what}; raise target_deadline_s, or give the target more") from None
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, FedmergeError):
                raise cause from None
            raise TargetError(f"the target failed: {type(cause).__name__}: {cause}") from error
        except ray.exceptions.RayError as error:
            final = not isinstance(error, ray.exceptions.ActorUnavailableError)
            raise Died(f"the target's actor is gone ({type(error).__name__}) while waiting for {what}", final) from None


@contextmanager
def shared_ray() -> Iterator[str]:
    """A Ray of this process, and the address at which other processes reach it. Raises TargetError."""
    import ray

    _start(ray)
    try:
        yield str(ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()


def _start(ray: Any) -> None:
    """Connect to `RAY_ADDRESS`, or start Ray for this process alone; Ray itself gives up after half a minute on a busy machine."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "namespace": f"fedmerge-{uuid.uuid4().hex[:12]}"}
    outside = os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {"address": "local", "num_cpus": _cores(), "include_dashboard": False}
    where = {"address": "auto"} if outside else own
    for attempt in range(START_ATTEMPTS):
        try:
            with nullcontext() if outside else sealed():
                ray.init(**where, **quiet)
            return
        except Exception as error:  # a bare Exception is what Ray raises where its daemons are too slow to start
            ray.shutdown()
            if attempt == START_ATTEMPTS - 1 or outside:
                said = (str(error).splitlines() or [type(error).__name__])[0]
                raise TargetError(f"Ray cannot be started or reached: {said}") from None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
