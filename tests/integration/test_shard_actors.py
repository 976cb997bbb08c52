"""Shards as real Ray actors: the same predictions as in this process, and a shard that dies is made anew."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest

from fedmerge.adaptation.ray.actor import RemoteTarget
from fedmerge.adaptation.ray.waiting import wait
from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import TargetTask
from fedmerge.errors import CheckpointError, TargetError
from fedmerge.experiment.stream_phase import Walk
from fedmerge.merging.methods._base import load_method
from fedmerge.report.batch_log import Step
from fedmerge.report.terminal import Terminal
from fedmerge.stream.events import Event, rosters
from tests.targets import base, experts
from tests.unit.adaptation.test_shards import BY_NAME, alike, spread

pytestmark = pytest.mark.slow
Targets = Callable[..., TargetTask]
METHODS = ("mean", "ties", "dare", "expert", "ensemble", "dcs", "eam", "t3", load_method("dawin", scope="prefix"))


def processes(target: RemoteTarget) -> list[int]:
    return [wait(actor.process.remote(), "a number", 60) for actor in target._shards.actors]


class Killer:
    """The target, one of whose shards is killed before some of its batches."""

    def __init__(self, target: RemoteTarget, kills: int) -> None:
        self.target, self.kills, self.position, self.killed_at = target, kills, 0, list[int]()

    def advance(self, batches: int) -> list[Step]:
        if self.position >= 4 * len(self.killed_at) and len(self.killed_at) < self.kills:
            numbers = processes(self.target)
            os.kill(numbers[len(self.killed_at) % len(numbers)], signal.SIGKILL)
            self.killed_at.append(self.position)
        steps = self.target.advance(batches)
        self.position = steps[-1].t + 1 if steps else self.position
        return steps

    def change(self, names: list[str], arriving: list) -> None:  # type: ignore[type-arg]
        self.target.change(names, arriving)


@pytest.mark.long
def test_shards_in_processes_of_their_own_predict_the_same_and_survive_deaths(target: Targets) -> None:
    """With a newcomer and a leaver, and two shards killed on the way."""
    task, events = target(*METHODS), (Event(at=4, join="west"), Event(at=8, leave="north"))
    whole = TargetSite(spread(task, 1), [BY_NAME["north"], BY_NAME["south"]], base())
    walk = Walk(whole, rosters(("north", "south"), events), BY_NAME, Terminal(quiet=True))
    wanted = [step for steps in walk for step in steps]
    with RemoteTarget(spread(task, 3), [BY_NAME["north"], BY_NAME["south"]], base(), 120, restarts=2) as there:
        assert there.describe().bank["shards"] == [1, 1]
        assert len({there.process(), os.getpid(), *processes(there)}) == 4
        killer = Killer(there, 2)
        walk = Walk(killer, rosters(("north", "south"), events), BY_NAME, Terminal(quiet=True))
        alike(wanted, [step for steps in walk for step in steps])
        assert there.revival.deaths == killer.killed_at
        assert len(killer.killed_at) == 2
        assert there.snapshot()["experts"] == ["south", "west"]
        os.kill(processes(there)[0], signal.SIGKILL)
        there.restore(there.snapshot() | {"position": 0})
        with pytest.raises(TargetError, match="a shard of the experts' bank is gone"):
            there.advance(1)


def test_an_expert_that_does_not_fit_is_refused_by_its_shard(target: Targets) -> None:
    north, south, west = experts()
    broken = replace(west, weights={name: array for name, array in west.weights.items() if name != "head.bias"})
    with (
        pytest.raises(CheckpointError, match=r"west does not fit the model:\n  missing: head\.bias"),
        RemoteTarget(spread(target("mean"), 2), [north, south, broken], base(), 60),
    ):
        pass
