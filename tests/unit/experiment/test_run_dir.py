"""What a killed run leaves behind does not spoil the run that goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedmerge.errors import FolderError
from fedmerge.experiment.experiment import load_experiment
from fedmerge.experiment.run_dir import RunFolder, reopened
from tests.front_door import world


def test_a_torn_line_of_the_audit_is_cut_off(tmp_path: Path) -> None:
    plan, run = load_experiment(world(tmp_path / "here")), tmp_path / "run"
    with RunFolder(run, plan):
        (run / "audit.jsonl").write_text('{"site": "north"}\n{"site": "so')
    with RunFolder(run, plan, keep=True):
        assert (run / "audit.jsonl").read_text() == '{"site": "north"}\n'
    with RunFolder(run, plan):
        assert (run / "audit.jsonl").read_text() == ""


def test_a_run_that_cannot_write_its_end_may_be_tried_again(tmp_path: Path) -> None:
    """In a notebook, where the error, and with it the run, is still held."""
    plan, run = load_experiment(world(tmp_path / "here")), tmp_path / "run"
    with pytest.raises(OSError, match=r"manifest\.json") as held, RunFolder(run, plan):
        (run / "manifest.json").unlink()
        (run / "manifest.json").mkdir()
    (run / "manifest.json").rmdir()
    (run / "audit.jsonl").unlink()
    (run / "audit.jsonl").mkdir()
    with pytest.raises(OSError, match=r"audit\.jsonl") as also, RunFolder(run, plan):
        pass
    (run / "audit.jsonl").rmdir()
    with RunFolder(run, plan):
        assert held.value.errno
        assert also.value.errno


def test_a_run_with_events_is_read_again_as_it_was(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    file.write_text(file.read_text() + "events: [{at: 1, join: east}, {at: 2, replace: north, by: north_new}]\nmin_sites: 2\n")
    north = (tmp_path / "here" / "sites" / "north.yaml").read_text()
    (tmp_path / "here" / "sites" / "north_new.yaml").write_text(north.replace("name: north", "name: north_new"))
    plan = load_experiment(file)
    with RunFolder(tmp_path / "run", plan):
        pass
    again, _ = reopened(tmp_path / "run")
    assert again == plan
    assert again.founders == ("north", "south")
    assert [site.name for site in again.sites] == ["north", "south", "east", "north_new"]


@pytest.mark.parametrize("content", [b"", b"- a", b"a word", b"name: [", b"\xff\xfe\x00"])
def test_a_folder_whose_scenario_cannot_be_read_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    plan, run = load_experiment(world(tmp_path / "here")), tmp_path / "run"
    run.mkdir()
    (run / "scenario.yaml").write_bytes(content)
    expected = "expected the scenario of a run. Choose another --out, or delete the folder"
    with pytest.raises(FolderError, match=rf"scenario\.yaml: found a file that cannot be read \(.+\); {re.escape(expected)}$"):
        RunFolder(run, plan).__enter__()
    assert [file.name for file in run.iterdir()] == ["scenario.yaml"]
    assert (run / "scenario.yaml").read_bytes() == content


def test_a_run_that_is_not_done_or_of_another_version_is_not_read_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    unfinished = pytest.raises(FolderError, match=r"found a run that is running; .*Give its command again, with --resume")
    with RunFolder(run, load_experiment(world(tmp_path / "here"))), unfinished:
        reopened(run)
    manifest, text = (run / "manifest.json").read_text(), (run / "scenario.yaml").read_text()
    (run / "scenario.yaml").write_text(f"{text}later: 1\n")
    with pytest.raises(FolderError, match=r"found no run \(later: "):
        reopened(run)
    (run / "scenario.yaml").write_text(text)
    (run / "manifest.json").write_text(json.dumps({name: one for name, one in json.loads(manifest).items() if name != "classes"}))
    with pytest.raises(FolderError, match=r"found no run \(without 'classes'\)"):
        reopened(run)
