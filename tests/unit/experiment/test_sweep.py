"""A sweep has its folder for itself, and says in it what it is at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedmerge.errors import FolderError, ScenarioError
from fedmerge.experiment.experiment import load_experiment
from fedmerge.experiment.run_dir import RunFolder
from fedmerge.experiment.sweep import Cell, Sweep, _claimed, _done, cells_of, run_sweep
from fedmerge.system.process import free_lock
from tests.front_door import world


def sweep_in(out: Path) -> Sweep:
    return Sweep(out.parent / "toy.yaml", (), (), out, out.parent / "pool", 1)


def told(out: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / "status.json").read_text())
    return found


def test_it_says_what_it_is_at_and_how_it_ended(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path / "out")
    with _claimed(sweep, quiet=True):
        assert (told(sweep.out)["state"], told(sweep.out)["sweep"]) == ("running", "toy")
        assert free_lock(sweep.out / ".lock") is None
    assert told(sweep.out)["state"] == "done"
    with pytest.raises(ZeroDivisionError), _claimed(sweep, quiet=True):
        _ = 1 / 0
    assert (told(sweep.out)["state"], told(sweep.out)["reason"]) == ("failed", "division by zero")


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path / "out")
    with _claimed(sweep, quiet=True):
        with pytest.raises(
            FolderError, match=r"--out: found '.*out', where another sweep runs; expected a folder for this one alone"
        ):
            run_sweep(sweep, quiet=True)
        assert told(sweep.out)["state"] == "running"


def test_the_folder_of_a_run_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(FolderError, match=r"--out: found '.*', the folder of a run; expected one for the sweep"):
        run_sweep(sweep_in(tmp_path), quiet=True)
    assert told(tmp_path) == {}


def test_a_cell_whose_files_cannot_be_read_is_done_again(tmp_path: Path) -> None:
    plan, folder, cell = load_experiment(world(tmp_path / "here")), tmp_path / "cell", Cell(3, (), None)
    with RunFolder(folder, plan):
        assert not _done(cell, folder, plan)
    row = {"accuracy": 0.5, "balanced_accuracy": 0.5, "ranked": True}
    whole = json.dumps({"methods": {"mean": row}})
    for content in (whole[: len(whole) // 2], "null", "{}", '{"methods": {"mean": {}}}'):
        (folder / "summary.json").write_text(content)
        assert not _done(cell, folder, plan)
    (folder / "summary.json").write_text(whole)
    assert _done(cell, folder, plan)
    for content in ("", "[]", "null", "{}"):
        (folder / "manifest.json").write_text(content)
        assert not _done(cell, folder, plan)


@pytest.mark.parametrize("targets", ["each", "east,mercy"])
@pytest.mark.parametrize("setting", ["target=north", "target=each,north", "target.site=north"])
def test_targets_are_said_once(targets: str, setting: str, tmp_path: Path) -> None:
    file, key = world(tmp_path / "here"), setting.partition("=")[0]
    with pytest.raises(ScenarioError, match=f"--set: {key}: found 'north', and --targets, which changes the same key"):
        cells_of(file, (), [setting], targets)
    assert cells_of(file, (), [setting], "")


def test_a_problem_of_one_target_names_it(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    cells = cells_of(file, (), (), "mercy,east")
    with pytest.raises(ScenarioError, match=r"tiny\.yaml, line \d+ \(target 'east'\): stream.kind: found a drift over one domain"):
        run_sweep(Sweep(file, cells, (), tmp_path / "out", tmp_path / "pool", 1), quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "targets", "folder"),
    [
        (["methods.eam.gamma=1,1"], "", "gamma=1-seed3"),
        (["stream.batch_size=8,'8'"], "", "batch_size=8-seed3"),
        ([], "east,sites/east.yaml", "east-seed3"),
    ],
)
def test_cells_of_one_folder_are_refused(settings: list[str], targets: str, folder: str, tmp_path: Path) -> None:
    """They would run beside each other, and each would take the other for another program."""
    with pytest.raises(ScenarioError, match=f"found two cells with the folder '{folder}'; expected a folder of its own for each"):
        cells_of(world(tmp_path / "here"), (), settings, targets)
