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
from fedmerge.federated.client.diwa import Run
from fedmerge.federated.messages import Initial, Job, Reply, Request, SiteTask, Tick
from fedmerge.federated.pool.experts import ExpertPool
from fedmerge.federated.server import in_process
from fedmerge.federated.server.in_process import LocalBackend

Hospital = Callable[..., SiteTask]
Jobs = Callable[..., Job]
answered = in_process._answered


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
    asked = job(hospital("north", runs=2, epochs=2000, retries=0), folder="killed")

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


def killed(request: Request, trained: tuple[Run, ...] | None = None) -> Reply:
    """A worker's answer for a hospital; of south it dies, each time or, where a file says so, the first time alone."""
    once = Path(os.environ["DIES_ONCE"]) if "DIES_ONCE" in os.environ else None
    if request.task.site.name == "south" and not (once and once.exists()):
        if once:
            once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return answered(request, trained)


@pytest.mark.parametrize("once", [True, False])
def test_who_loses_a_worker_is_asked_again_and_fails_alone(
    once: bool, hospital: Hospital, job: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_process, "_answered", killed)
    if once:
        monkeypatch.setenv("DIES_ONCE", str(tmp_path / "died"))
    tasks = [hospital(name, runs=1, epochs=1) for name in ("north", "south", "east", "west")]
    asked = job(*tasks, folder="asked")
    outcomes = LocalBackend(jobs=2).gather(asked, lambda _: None)
    assert {name for name, outcome in outcomes.items() if outcome.trained} == {"north", "east", "west"} | (
        {"south"} if once else set()
    )
    assert once or "process is gone" in outcomes["south"].reason
    assert not active_children()


def test_a_worker_that_dies_between_two_rounds_is_replaced(hospital: Hospital, initial: Initial) -> None:
    request = Request("train", hospital("north", runs=1, epochs=1), dict(initial.weights))
    with LocalBackend(jobs=2)._workers(lambda _: None) as ask:
        (first,) = ask([request], 60)
        for process in active_children():
            process.kill()
            process.join()
        (second,) = ask([request], 60)
    assert first.upload is not None and second.upload is not None
    assert all(torch.equal(tensor, second.upload.weights[name]) for name, tensor in first.upload.weights.items())


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
