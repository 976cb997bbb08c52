"""A sweep by the front door: experts once, cells in parallel, tables, and going on where it stopped."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_run import world

pytestmark = pytest.mark.slow


def sweep(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fedmerge.cli import main; main()", "sweep", "scenarios/tiny.yaml", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, env=environment)


def test_one_command_sweeps_targets_and_goes_on(tmp_path: Path) -> None:
    world(tmp_path / "here")
    options = ("--set", "stream={kind: temporal, batch_size: 8}", "--methods", "mean,eam")
    first = sweep(tmp_path / "here", *options, "--targets", "each")
    assert first.returncode == 0, first.stderr + first.stdout
    folder = tmp_path / "here" / "runs" / "tiny-sweep"
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["target"], row["method"]) for row in rows} == {(t, m) for t in ("north", "south") for m in ("mean", "eam")}
    assert len(rows) == 4
    assert "data:image/svg+xml" in (folder / "sweep.html").read_text()
    assert len(list((tmp_path / "here" / "pool" / "experts").iterdir())) == 2  # each trained once, for all its cells
    digests = {cell.name: json.loads((cell / "summary.json").read_text())["stream"] for cell in (folder / "cells").iterdir()}
    assert len({digest["index_sha256"] for digest in digests.values()}) == 2
    (next((folder / "cells").iterdir()) / "summary.json").unlink()
    again = sweep(tmp_path / "here", *options, "--targets", "each")
    assert again.returncode == 0, again.stderr
    assert "2 cells, 1 of them done before" in again.stdout
    wrong = sweep(tmp_path / "here", "--set", "methods.eam.gama=1")
    assert wrong.returncode == 2
    assert "did you mean 'gamma'?" in wrong.stderr
