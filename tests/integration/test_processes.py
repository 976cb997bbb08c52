"""The backend `deployment`: Flower's processes on this machine, with the bits of the other backends."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmerge.federated.flower.processes import ProcessesBackend
from fedmerge.federated.messages import Job, SiteTask, Tick
from fedmerge.federated.pool.experts import ExpertPool
from tests.front_door import command, done, same_predictions, world

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]


def experts(pool: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in pool.glob("experts/*/expert.safetensors")}


def flower_processes() -> list[str]:
    """Of this test process, whether it has started them itself or not."""
    ours = f"FEDMERGE_CACHE={os.environ['FEDMERGE_CACHE']}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            content = (process / "environ").read_bytes()
        except OSError:
            continue
        if ours in content and b"FLWR_HOME=" in content:
            found.append(process.name)
    return found


def test_three_backends_give_the_same_experts_and_predictions(tmp_path: Path) -> None:
    world(tmp_path)
    for backend in ("local", "simulation", "deployment"):
        done(tmp_path, "--backend", backend, "--pool", f"pool-{backend}", "--out", f"run-{backend}", by=command)
    plain = experts(tmp_path / "pool-local")
    assert len(plain) == 2
    for backend in ("simulation", "deployment"):
        assert experts(tmp_path / f"pool-{backend}") == plain
        assert same_predictions(tmp_path / f"run-{backend}", tmp_path / "run-local")
    assert (tmp_path / "run-deployment" / "federation.log").stat().st_size > 0
    assert not flower_processes()


def test_a_hospital_that_fails_or_never_answers_costs_the_others_nothing(
    hospital: Callable[..., SiteTask], job: Callable[..., Job], folder_of_text: dict[str, object]
) -> None:
    ticks = list[Tick]()
    quick, bad = hospital("quick"), hospital("bad", folder_of_text)
    endless = hospital("endless", epochs=100_000, max_steps=10_000_000)
    asked = job(quick, bad, endless, deadline_s=90)
    outcomes = ProcessesBackend().gather(asked, ticks.append)
    assert (outcomes["quick"].trained, outcomes["quick"].reason) == (True, "")
    assert outcomes["bad"].reason.startswith("source.max_broken: found more than 2 files that are no image")
    assert "liver" not in outcomes["bad"].reason
    assert outcomes["endless"].reason == "did not answer within 90 s"
    assert {tick.site for tick in ticks} >= {"quick", "endless"}
    assert [task.site.name for task in asked.tasks if ExpertPool(asked.pool).has(task)] == ["quick"]
    assert not flower_processes()
