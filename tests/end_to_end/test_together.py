"""Two runs at once on one machine: neither knows of the other, and no expert is trained twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedmerge.system.process import free_lock
from tests.front_door import command, read, without_times, world

pytestmark = pytest.mark.slow


def begin(folder: Path, *options: str) -> subprocess.Popen[str]:
    """A run by the front door, in the background."""
    words = [sys.executable, "-m", "fedmerge.simulate", "scenarios/tiny.yaml", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_two_cold_runs_share_a_pool_and_agree(tmp_path: Path) -> None:
    """Both want the same experts at the same moment, and train much longer than they differ in when they begin."""
    folder = tmp_path / "here"
    world(folder)
    both = [begin(folder, "--out", f"runs/{name}", "--set", "training.epochs=400") for name in ("a", "b")]
    try:
        said = [run.communicate(timeout=1000) for run in both]
    finally:
        for run in both:
            run.kill()
    assert [run.returncode for run in both] == [0, 0], said
    a, b = (read(folder / "runs" / name / "summary.json") for name in ("a", "b"))
    assert without_times(a) == without_times(b)
    trained = [[site["trained"] for site in summary["sites"]] for summary in (a, b)]
    assert sorted(trained) == [[False, False], [True, True]]
    assert len(list((folder / "pool" / "experts").iterdir())) == 2
    assert "for another run; waiting for it" in said[trained.index([False, False])][0]


def test_a_folder_in_which_a_run_is_going_on_is_refused(tmp_path: Path) -> None:
    world(tmp_path)
    (tmp_path / "run").mkdir()
    held = free_lock(tmp_path / "run" / ".lock")
    assert held is not None
    with held:
        ended = command(tmp_path, "--out", "run")
    assert ended.returncode == 2
    assert "found another process that writes here; expected a folder for this run alone. Choose another --out" in ended.stderr
