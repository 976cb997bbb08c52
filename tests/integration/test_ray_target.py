"""A real Ray actor: the same steps as in this process, and errors instead of silence."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray

from fedmerge.adaptation.ray.actor import RemoteTarget
from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import Contribution, TargetTask
from fedmerge.errors import DataError, TargetError
from fedmerge.federated.client.site_log import own_log
from fedmerge.report.batch_log import Step
from fedmerge.stream.events import Event
from tests.targets import base, experts
from tests.unit.adaptation.test_changes import NORTH, REMEMBERING, SOUTH, exact, same, site, walked

Targets = Callable[..., TargetTask]


@pytest.mark.slow
def test_the_actor_does_what_the_loop_does(target: Targets) -> None:
    """In the Ray of who calls, as in a notebook: it is there afterwards, with all that it holds."""
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    own = ray.put("own")
    here = TargetSite(target(), experts(), base())
    with RemoteTarget(target(), experts(), base(), 60) as there:
        assert there.describe().stream.index_sha256 == here.stream.index_sha256
        for a, b in zip(here.advance(3), there.advance(3), strict=True):
            assert (a.t, a.method, a.correct, a.forwards) == (b.t, b.method, b.correct, b.forwards)
            np.testing.assert_array_equal(a.probabilities, b.probabilities)
        assert there.snapshot()["position"] == 3
        there.restore(here.snapshot())
        assert there.forwards_so_far() == here.forwards_so_far()
        assert [len(batch) for batch in there.answers().labels] == [8] * there.describe().stream.batches
    assert ray.get(own) == "own"
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_what_the_target_told_outlives_its_cluster(target: Targets) -> None:
    """Ray hands out views of its shared memory, which other jobs of a cluster overwrite after this one has left."""
    with RemoteTarget(target(), experts(), base(), 60) as there:
        steps, told, answers, snapshot = there.advance(2), there.describe(), there.answers(), there.snapshot()
    arrays = [told.stream.truth, *answers.labels, *answers.domains, *[step.probabilities for step in steps]]
    arrays += [value for state in snapshot["states"].values() for value in state.values()]
    assert all(array.flags.owndata and array.flags.writeable for array in arrays)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_target_that_dies_or_stays_silent_is_an_error_and_no_hang(target: Targets) -> None:
    waited = r"waited 0.01 s for the target's answer to 'advance'"
    with pytest.raises(TargetError, match=waited), RemoteTarget(target(images=2400), experts(), base(), 0.01) as there:
        there.advance(1000)
    with RemoteTarget(target(), experts(), base(), 60) as there:
        os.kill(there.process(), signal.SIGKILL)
        with pytest.raises(TargetError, match="actor is gone"):
            there.advance(1)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_users_mistake_at_the_target_arrives_as_such(target: Targets, tmp_path: Path) -> None:
    source = {"kind": "image_folder", "root": str(tmp_path / "gone")}
    with (
        pytest.raises(DataError, match=r"source\.root: cannot be used") as error,
        RemoteTarget(target(source=source), experts(), base(), 60),
    ):
        pass
    assert "gone" not in str(error.value)  # the target is a hospital, too: its own log has the path
    assert f"'{tmp_path / 'gone'}', which does not exist" in own_log(target().site.name).read_text()


class Killer:
    """The target, which is killed before some of its batches."""

    def __init__(self, target: RemoteTarget) -> None:
        self.target, self.position, self.killed_at = target, 0, list[int]()

    def advance(self, batches: int) -> list[Step]:
        if self.position >= 4 * len(self.killed_at) and len(self.killed_at) < 3:
            os.kill(self.target.process(), signal.SIGKILL)
            self.killed_at.append(self.position)
        steps = self.target.advance(batches)
        self.position = steps[-1].t + 1 if steps else self.position
        return steps

    def change(self, names: list[str], arriving: list[Contribution]) -> None:
        self.target.change(names, arriving)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_target_that_dies_comes_back_and_goes_on_with_the_same_bits(target: Targets) -> None:
    """Killed while it waits, while it works, and right after a change; Ray starts it again each time."""
    task, events = target(*REMEMBERING, "mean", "expert"), (Event(at=4, join="west"), Event(at=8, leave="north"))
    whole = walked(site(task, "north", "south"), ("north", "south"), *events)
    with RemoteTarget(exact(task), [NORTH, SOUTH], base(), 120, restarts=3) as there:
        killer = Killer(there)
        found = walked(killer, ("north", "south"), *events)
        same(found, whole)
        assert there.revival.deaths == killer.killed_at
        assert len(killer.killed_at) == 3
        os.kill(there.process(), signal.SIGKILL)
        with pytest.raises(Exception, match="actor is gone"):
            there.answers()
