"""A run in one process needs neither Flower nor Ray, from its import to its report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.front_door import world

pytestmark = pytest.mark.slow

CODE = """
import sys
sys.modules.update(dict.fromkeys(["flwr", "ray"]))
from fedmerge.simulate import command_alone
command_alone()
"""


def local(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, "scenarios/tiny.yaml", "--backend", "local", "--jobs", "1", "--quiet", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


def test_a_local_run_needs_neither_flower_nor_ray(tmp_path: Path) -> None:
    world(tmp_path)
    ended = local(tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs" / "tiny-3" / "report.html").exists()

    ended = local(tmp_path, "--set", "federated=[fedavg]", "--out", "runs/rounds")  # Flower's strategy
    assert ended.returncode == 2
    assert ended.stderr.endswith("pip install 'fedmerge[simulation]'\n")

    ended = local(tmp_path, "--backend", "simulation", "--out", "runs/simulation")
    assert ended.returncode == 2
    assert ended.stderr.endswith("pip install 'fedmerge[simulation]'\n")
