"""What machines that are shared do to a run: locked folders, long paths, signals from outside."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.front_door import fedmerge, read, simulate, world


@pytest.mark.parametrize("option", ["--out", "--pool"])
@pytest.mark.parametrize("backend", ["local", "simulation"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_computed(tmp_path: Path, option: str, backend: str) -> None:
    world(tmp_path)
    (tmp_path / "file").write_text("in the way")
    ended = simulate(tmp_path, option, "file/below", "--backend", backend)
    assert ended.returncode == 2
    found, mend = "'file/below', which cannot be written (Not a directory)", "Choose another, or change its rights"
    assert ended.stderr == f"fedmerge: {option}: found {found}; expected a folder that this user may write. {mend}\n"
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(("name", "verb"), [("RAY_TMPDIR", "simulate"), ("TMPDIR", "sweep")])
def test_a_path_too_long_for_rays_sockets_is_told_at_once(
    tmp_path: Path, name: str, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world(tmp_path)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, str(tmp_path / ("scratch" * 10)))
    ended = fedmerge(tmp_path, verb, "scenarios/tiny.yaml", "--set", "backend=simulation")
    assert ended.returncode == 2
    said = ended.stderr + ended.stdout
    assert f"{name}: found a path of {len(str(tmp_path)) + 71} characters; expected at most 39" in said
    assert "Set RAY_TMPDIR=/tmp" in said


@pytest.mark.parametrize("words", [["simulate", "--jobs", "2"], ["sweep"]])
def test_a_path_too_long_for_sockets_of_workers_is_told_at_once(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world(tmp_path)
    (tmp_path / ("scratch" * 10)).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("scratch" * 10)))
    command = [sys.executable, "-m", "fedmerge", words[0], "scenarios/tiny.yaml", *words[1:], "--out", "run"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert f"TMPDIR: found a path of {len(str(tmp_path)) + 71} characters; expected at most 75" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_run_that_is_ended_from_outside_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `docker stop` and a cluster's scheduler end it: what it said, its manifest, its temporary folder, its processes."""
    world(tmp_path)
    scratch = tmp_path.parent / "ended"  # of a short path, for sockets
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    words = [sys.executable, "-m", "fedmerge.simulate", "scenarios/tiny.yaml", "--jobs", "2", "--set", "training.epochs=100000"]
    with subprocess.Popen([*words, "--out", "run"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        while "hospitals: north, south train" not in run.stdout.readline():
            assert run.poll() is None
        run.send_signal(signal.SIGTERM)
        said = run.communicate()[1]
    kept = "experts that have arrived are in the pool; the same command with --resume goes on from there"
    assert (run.returncode, said) == (143, f"fedmerge: ended by SIGTERM; {kept}\n")
    manifest = read(tmp_path / "run" / "manifest.json")
    assert (manifest["status"], manifest["reason"]) == ("failed", "ended by SIGTERM")
    left = {file.name for file in scratch.iterdir()}
    assert {
        name for name in left if not name.startswith("torchinductor_")
    } == set()  # a cache that importing torch makes, of the user


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_cell_outlives_its_sweep(tmp_path: Path, number: int) -> None:
    """Also where the sweep can do nothing more for it: the cell ends as if it had been asked to."""
    world(tmp_path)
    words = [sys.executable, "-m", "fedmerge", "sweep", "scenarios/tiny.yaml", "--set", "training.epochs=100000", "--out", "swept"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=(tmp_path / "err").open("w"), text=True) as run:
        assert run.stdout is not None
        while "hospitals: north, south train" not in run.stdout.readline():
            assert run.poll() is None
        run.send_signal(number)
        run.wait()
    kept = "fedmerge: ended by SIGTERM; what is done is kept; the same command goes on from there\n"
    assert (tmp_path / "err").read_text() == (kept if number == signal.SIGTERM else "")
    (manifest,) = tmp_path.glob("swept/cells/*/manifest.json")
    began = time.monotonic()
    while read(manifest)["status"] == "running" and time.monotonic() - began < 60:
        time.sleep(0.1)
    assert (read(manifest)["status"], read(manifest)["reason"]) == ("failed", "ended by SIGTERM")


def test_a_group_may_read_a_pool_that_one_of_them_has_filled(first: tuple[Path, str]) -> None:
    pool = first[0] / "pool"
    wanted = stat.S_IMODE((first[0] / "said.txt").stat().st_mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in pool.rglob("*.safetensors")} == {wanted}
