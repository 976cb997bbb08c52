"""The backend `local`: hospitals one after the other, or their runs spread over worker processes, with the same bits."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from fedmerge.data.datasets.organ_phantom import ORGANS
from fedmerge.federated.messages import Job, SiteTask, Tick
from fedmerge.federated.pool.experts import ExpertPool
from fedmerge.federated.server.in_process import LocalBackend

Hospital = Callable[..., SiteTask]
Jobs = Callable[..., Job]


def test_runs_spread_over_workers_give_the_same_experts(hospital: Hospital, job: Jobs, tmp_path: Path) -> None:
    """One of the hospitals cannot be used: its reason is told, and the others lose nothing."""
    tasks = [hospital("north", runs=2, epochs=1), hospital("south", runs=3, epochs=1)]
    for label in ORGANS:
        (tmp_path / "album" / "ward" / label).mkdir(parents=True)
        (tmp_path / "album" / "ward" / label / "0.png").write_bytes(b"no image")
    source = {"kind": "image_folder", "root": str(tmp_path / "album")}
    broken = SiteTask.model_validate(hospital("broken", runs=2).model_dump() | {"site": {"name": "broken", "source": source}})
    one, several = job(*tasks, folder="one"), job(*tasks, broken, folder="several")
    threads, ticks = torch.get_num_threads(), list[Tick]()
    assert not any(outcome.reason for outcome in LocalBackend().gather(one, lambda _: None).values())
    outcomes = LocalBackend(jobs=2).gather(several, ticks.append)
    assert torch.get_num_threads() == threads
    assert {name: outcome.trained for name, outcome in outcomes.items()} == {"north": True, "south": True, "broken": False}
    assert outcomes["broken"].reason
    for task in tasks:
        assert ExpertPool(one.pool).load(task).sha256 == ExpertPool(several.pool).load(task).sha256
    assert {tick.site for tick in ticks} >= {"north", "south"}
    assert all(0 <= tick.done <= tick.total == 100 for tick in ticks)
    assert not active_children()


def test_a_killed_worker_is_a_reason_and_never_a_hang(hospital: Hospital, job: Jobs) -> None:
    asked = job(hospital("north", runs=2, epochs=2000), folder="killed")

    def kill() -> None:
        while not (there := active_children()):
            time.sleep(0.05)
        time.sleep(0.5)
        there[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    outcomes = LocalBackend(jobs=2).gather(asked, lambda _: None)
    killer.join()
    assert "process is gone" in outcomes["north"].reason
    assert not active_children()


def test_workers_leave_ctrl_c_to_their_parent(hospital: Hospital, job: Jobs, capfd: pytest.CaptureFixture[str]) -> None:
    """A terminal sends it to all processes. Above one half, both have begun."""
    pressed: list[int] = []

    def press(tick: Tick) -> None:
        if tick.done > 50 and not pressed:
            pressed.extend(process.pid for process in active_children() if process.pid)
            for number in pressed:
                os.kill(number, signal.SIGINT)

    outcomes = LocalBackend(jobs=2).gather(job(hospital("north", runs=2, epochs=8), folder="pressed"), press)
    assert len(pressed) == 2
    assert outcomes["north"].trained
    assert "KeyboardInterrupt" not in capfd.readouterr().err


def test_who_is_late_is_told_and_ended(hospital: Hospital, job: Jobs) -> None:
    asked = job(hospital("north", runs=2, epochs=100_000), folder="late", deadline_s=3.0)
    outcomes = LocalBackend(jobs=2).gather(asked, lambda _: None)
    assert outcomes["north"].reason == "did not answer within 3 s"
    assert not active_children()
