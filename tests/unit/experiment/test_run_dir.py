"""What a killed run leaves behind does not spoil the run that goes on."""

from __future__ import annotations

from pathlib import Path

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
