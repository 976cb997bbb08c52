"""A small federation on the disk, and runs of it by the front door.

`simulate` and `fedmerge` give the command in this process, by the backend that the scenario names: local. `command` gives it as a
process of its own, as a user does; what only real Flower and real Ray can show is asked for with `--backend simulation`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from filelock import FileLock
from typer.testing import CliRunner

from fedmerge.cli.main import app
from tests.conftest import TINY

SCENARIO = {
    "name": "tiny",
    "seed": 3,
    "backend": "local",
    "jobs": 1,
    "model": TINY,
    "initialization": {"kind": "proxy", "source": {"kind": "organ_phantom", "images": 60, "patients": 12}, "epochs": 1},
    "sites": ["north", "south"],
    "training": {"runs": 2, "epochs": 2, "optimizer": "adamw", "diversity": {"lr": {"default": 1e-3, "draw": [2e-3]}}},
    "target": "mercy",
    "stream": {"kind": "mixture_drift", "batch_size": 8},
    "methods": ["mean", "weighted_mean", "expert", "ensemble", "dcs", {"eam": {"gamma": 5}}],
}
PHANTOM = {"kind": "organ_phantom", "images": 80, "patients": 16}


def world(root: Path) -> Path:
    """A folder with a scenario and its sites; returns the scenario's file."""
    (root / "sites").mkdir(parents=True)
    (root / "scenarios").mkdir()
    for name, planes in {"north": ["axial"], "south": ["coronal"], "east": ["sagittal"], "mercy": ["axial", "coronal"]}.items():
        site = {"name": name, "source": {**PHANTOM, "planes": planes}, "scanner": {"noise": 0.05}, "samples": 1}
        (root / "sites" / f"{name}.yaml").write_text(yaml.safe_dump(site))
    (root / "scenarios" / "tiny.yaml").write_text(yaml.safe_dump(SCENARIO))
    return root / "scenarios" / "tiny.yaml"


@cache
def ray_address() -> str:
    """A Ray of this test process, for runs that are not about Ray's beginning and end: those take more time than a tiny run."""
    from ray.cluster_utils import Cluster

    one = {"num_cpus": 1, "include_dashboard": False}  # Flower starts a process that knows torch for each
    cluster = Cluster(initialize_head=True, head_node_args=one)
    atexit.register(cluster.shutdown)
    return str(cluster.address)


def simulate(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The main job in this process; `scenarios/tiny.yaml` unless another file comes first."""
    scenario = [] if options and options[0].endswith(".yaml") else ["scenarios/tiny.yaml"]
    return fedmerge(folder, "simulate", *scenario, *options)


def fedmerge(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The console script's `words` in this process, in another working folder."""
    with contextlib.chdir(folder):
        ended = CliRunner().invoke(app, list(words))
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return subprocess.CompletedProcess(words, ended.exit_code, ended.stdout, ended.stderr)


def command(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The main job as a process of its own."""
    scenario = [] if options and options[0].endswith(".yaml") else ["scenarios/tiny.yaml"]
    words = [sys.executable, "-m", "fedmerge.simulate", *scenario, *options]
    here = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=280, env=here)


def done(folder: Path, *options: str, by: Callable[..., subprocess.CompletedProcess[str]] = simulate) -> str:
    """What a run printed that has ended well. by: `simulate` or `command`."""
    ended = by(folder, *options)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert ended.stderr == ""
    return ended.stdout


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def lines(run: Path) -> list[str]:
    return (run / "audit.jsonl").read_text().splitlines()


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary but for what the clock says, and who trained when."""
    sites = [{name: value for name, value in site.items() if name != "trained"} for site in summary["sites"]]
    methods = {key: {name: v for name, v in row.items() if name != "seconds"} for key, row in summary["methods"].items()}
    return {**summary, "sites": sites, "methods": methods}


def same_predictions(run: Path, other: Path) -> bool:
    """Bit for bit, and NaN where a row was not there."""
    with np.load(run / "predictions.npz") as a, np.load(other / "predictions.npz") as b:
        return a.files == b.files and all(np.array_equal(a[name], b[name], equal_nan=a[name].dtype.kind == "f") for name in a.files)


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run with a cold pool, and what it printed: run by the first test process that asks, copied by each that uses it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "first"
    with FileLock(f"{shared}.lock"):
        if not (shared / "said.txt").exists():
            world(shared)
            (shared / "said.txt").write_text(done(shared, by=command))
    folder = tmp_path_factory.mktemp("world") / "here"
    shutil.copytree(shared, folder)
    return folder, (folder / "said.txt").read_text()


@pytest.fixture
def shared_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Federations of this test connect to the Ray of the test process."""
    monkeypatch.setenv("RAY_ADDRESS", ray_address())
