"""A cluster that loses a machine in mid-run: never a hang, never a traceback, and what was done is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.front_door import SCENARIO, command, done, read, same_predictions, world

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]

ONLY_TRAINING = ("--out", "runs/lost", "--experts-only")

NOTICED_S = 240.0
"""Longest that a run may take to end once its cluster is lost, seconds, on a busy machine."""


@contextmanager
def cluster(monkeypatch: pytest.MonkeyPatch, **head: Any) -> Iterator[Any]:
    """A head, on which a lost node is noticed sooner than after half a minute."""
    from ray.cluster_utils import Cluster

    for name, value in {"period_ms": 500, "initial_delay_ms": 0, "failure_threshold": 4, "timeout_ms": 2000}.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))
    started = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})
    try:
        yield started
    finally:
        started.shutdown()


@contextmanager
def run(folder: Path, address: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The command on that cluster, in the background; its end is not waited for."""
    here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "RAY_ADDRESS": address}
    words = [sys.executable, "-m", "fedmerge.simulate", "scenarios/tiny.yaml", "--backend", "simulation", *options]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=folder, env=here, start_new_session=True, **pipes) as child:
        try:
            yield child
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)


def test_a_head_that_is_lost_while_the_stream_runs_is_one_error_and_resume_goes_on(
    first: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = first
    with cluster(monkeypatch, num_cpus=2) as there, run(folder, there.address, "--out", "runs/lost") as child:
        while not list((folder / "runs" / "lost" / "progress").glob("*.npz")):
            assert child.poll() is None, child.communicate()
            time.sleep(0.01)
        there.remove_node(there.head_node, allow_graceful=False)
        _, said = child.communicate(timeout=NOTICED_S)
    assert child.returncode == 1, said
    assert "Ray's head at" in said
    assert "--resume" in said
    assert "Traceback" not in said
    done(folder, "--out", "runs/lost", "--resume", "--backend", "simulation", by=command)
    assert same_predictions(folder / "runs" / "lost", folder / "runs" / "tiny-3")


def test_a_head_that_is_lost_while_hospitals_train_is_one_error_and_resume_goes_on(
    longer: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster(monkeypatch, num_cpus=2) as there, run(longer, there.address, *ONLY_TRAINING) as child:
        trains(child)
        there.remove_node(there.head_node, allow_graceful=False)
        _, said = child.communicate(timeout=NOTICED_S)
    assert child.returncode == 2, said
    assert said.startswith("fedmerge: site 'north': its client failed: its process is gone (Actor")
    assert "Traceback" not in said
    done(longer, *ONLY_TRAINING, "--resume", "--backend", "simulation", by=command)
    assert experts(longer) == undisturbed


def test_a_hospital_on_a_lost_machine_trains_again_on_the_one_that_takes_its_place(
    longer: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster(monkeypatch, num_cpus=1) as there:
        ward = there.add_node(num_cpus=1)
        with run(longer, there.address, *ONLY_TRAINING) as child:
            trains(child)
            there.remove_node(ward, allow_graceful=False)
            there.add_node(num_cpus=1)  # idle clients keep the CPUs that they were given
            _, said = child.communicate(timeout=NOTICED_S)
        assert child.returncode == 0, said
    assert experts(longer) == undisturbed
    assert read(longer / "runs" / "lost" / "manifest.json")["asked_again"] != {}


@pytest.fixture
def longer(tmp_path: Path) -> Path:
    """The small federation with hospitals that train much longer than they differ in when they begin."""
    training = {**SCENARIO["training"], "epochs": 600, "retries": 5}
    world(tmp_path / "here").write_text(yaml.safe_dump({**SCENARIO, "training": training}))
    return tmp_path / "here"


@pytest.fixture
def undisturbed(longer: Path) -> dict[str, str]:
    """Its experts, trained where nothing is lost."""
    done(longer, "--out", "runs/whole", "--pool", "pool-whole", "--experts-only")
    return experts(longer, "pool-whole")


def trains(child: subprocess.Popen[str]) -> None:
    """Wait until every hospital has done a quarter of its training."""
    told: set[str] = set()
    while len(told) < 2:
        line = child.stdout.readline() if child.stdout else ""
        assert line, child.communicate()
        told |= {line.strip().split(":")[0]} if ": run " in line else set()
        assert "100%" not in line or not told, "training was over before anything could be lost"


def experts(folder: Path, pool: str = "pool") -> dict[str, str]:
    """Digest of every expert in a pool."""
    entries = [read(file) for file in (folder / pool / "experts").glob("[a-z]*/manifest.json")]
    return {entry["site"]: entry["sha256"] for entry in entries}
