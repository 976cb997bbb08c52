"""Hospitals that join, leave, cheat or fail, and drivers that are killed, by the real front door."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fedmerge.federated.client.site_log import own_log
from tests.front_door import PHANTOM, SCENARIO, done, lines, read, same_predictions, simulate, without_times

pytestmark = pytest.mark.slow


def test_who_is_left_out_might_never_have_been_there(first: tuple[Path, str]) -> None:
    folder, _ = first
    (folder / "scenarios" / "three.yaml").write_text(yaml.safe_dump({**SCENARIO, "sites": ["east", "north", "south"]}))
    done(folder, "scenarios/three.yaml", "--without", "east", "--out", "runs/without")
    run, never = folder / "runs" / "without", folder / "runs" / "tiny-3"
    assert without_times(read(run / "summary.json")) == without_times(read(never / "summary.json"))
    assert same_predictions(run, never)
    assert read(run / "manifest.json")["trained"] == {"north": False, "south": False}
    assert (run / "audit.jsonl").read_text() == ""  # nobody was asked anything


@pytest.mark.long
def test_a_killed_run_with_events_goes_on_as_if_nothing_had_happened(first: tuple[Path, str]) -> None:
    folder, _ = first
    events = [{"at": 1, "join": "east"}, {"at": 4, "leave": "north"}]
    remembering = ["mean", "expert", "eam", "adamerging"]
    scenario = {**SCENARIO, "name": "events", "methods": remembering, "events": events}
    (folder / "scenarios" / "events.yaml").write_text(yaml.safe_dump(scenario))
    said = done(folder, "scenarios/events.yaml", "--out", "runs/undisturbed")
    assert "before batch 1: east joins" in said
    run, whole = folder / "runs" / "killed", folder / "runs" / "undisturbed"
    command = [sys.executable, "-m", "fedmerge.simulate", "scenarios/events.yaml", "--out", "runs/killed", "--quiet"]
    with subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}) as driver:
        while driver.poll() is None and not list((run / "progress").glob("*.npz")):
            time.sleep(0.01)
        driver.kill()
    assert driver.returncode == -signal.SIGKILL
    done(folder, "scenarios/events.yaml", "--out", "runs/killed", "--resume")
    assert same_predictions(run, whole)
    assert without_times(read(run / "summary.json")) == without_times(read(whole / "summary.json"))
    counted = [(json.loads(line)["t"], json.loads(line)["method"]) for line in (run / "batches.jsonl").read_text().splitlines()]
    assert len(set(counted)) == len(counted)
    summary, report = read(whole / "summary.json"), (whole / "report.html").read_text()
    assert summary["methods"]["mean"]["covers"] is None
    assert summary["methods"]["expert:east"]["covers"] == [[1, summary["stream"]["batches"] - 1]]
    assert summary["methods"]["expert:north"]["covers"] == [[0, 3]]
    assert not summary["methods"]["expert:north"]["ranked"]
    assert [change["change"] for change in summary["changes"]] == ["east joins", "north leaves"]
    assert "before batch 4" in report
    late = simulate(folder, "scenarios/events.yaml", "--set", "events=[{at: 99, join: east}]", "--out", "runs/late")
    assert late.returncode == 2
    assert "events[0].at: found 99; expected at most" in late.stderr
    assert not (folder / "runs" / "late").exists()


def test_a_hospital_joins_and_nobody_else_trains_and_if_it_cheats_it_is_left_out(first: tuple[Path, str]) -> None:
    folder, _ = first
    site = {"name": "cheat", "source": {**PHANTOM, "planes": ["sagittal"]}, "attack": {"scale_head": {"factor": 1000}}}
    (folder / "sites" / "cheat.yaml").write_text(yaml.safe_dump(site))
    past_the_gate = ("--set", "limits.growth=1000")  # so large a factor would not be let into the pool
    said = done(folder, "--add-site", "sites/cheat.yaml", "--out", "runs/cheated", "--methods", "mean,eam", *past_the_gate)
    assert "SIMULATED ATTACKER: site 'cheat' attacks on purpose: scale_head (factor 1000.0)" in said
    assert "DEFENSE calibration: the expert of 'cheat' is left out" in said
    run = folder / "runs" / "cheated"
    found, before = read(run / "summary.json"), read(folder / "runs/tiny-3/summary.json")
    assert "hospitals: cheat train" in said
    assert read(run / "manifest.json")["trained"] == {"north": False, "south": False, "cheat": True}
    assert {json.loads(line)["site"] for line in lines(run)} == {"cheat"}
    assert [site["expert_sha256"] for site in found["sites"][:2]] == [site["expert_sha256"] for site in before["sites"]]
    assert f"north {found['sites'][0]['expert_sha256'][:12]} (from the pool)" in said
    assert set(found["methods"]) == {"mean", "eam"}
    assert {site["name"]: site["left_out"] for site in found["sites"]} == {"north": "", "south": "", "cheat": "calibration"}
    for name in ("mean", "eam"):  # to the last digit what they are without it
        assert found["methods"][name]["accuracy"] == before["methods"][name]["accuracy"]
        assert found["methods"][name]["nll"] == before["methods"][name]["nll"]
    assert read(run / "manifest.json")["vetting"]["left_out"] == {"cheat": "calibration"}
    assert [json.loads(x)["verdict"].split(":")[0] for x in lines(run) if json.loads(x)["kind"] == "verdict"] == ["left out"]
    page = (run / "report.html").read_text()
    assert "Simulated attacker: cheat" in page
    assert "Left out by the check of calibration" in page


def test_images_that_cannot_be_used_cost_no_other_hospital_its_expert(first: tuple[Path, str]) -> None:
    folder, _ = first
    shutil.rmtree(folder / "album", ignore_errors=True)
    for label in yaml.safe_load((folder / "runs/tiny-3/manifest.json").read_text())["classes"]:
        (folder / "album" / "ward" / label).mkdir(parents=True)
        for number in range(3):
            (folder / "album" / "ward" / label / f"{number}.png").write_bytes(b"no image")
    site = {"name": "west", "source": {"kind": "image_folder", "root": "album"}}
    (folder / "sites" / "west.yaml").write_text(yaml.safe_dump(site))
    options = ("--add-site", "sites/west.yaml", "--set", "min_sites=2", "--methods", "mean", "--out", "runs/west")
    said = done(folder, *options)
    assert "site 'west'" in said
    assert "the run goes on without it" in said
    assert "ward/bladder/0.png" not in said  # names of files may be names of patients: the hospital's own log has them
    assert f"in full, at the site: {own_log('west')}" in said.replace("\n", "")
    assert "ward/bladder/0.png" in own_log("west").read_text()
    for left in ("manifest.json", "audit.jsonl"):
        assert "bladder/0.png" not in (folder / "runs/west" / left).read_text()
    assert [site["name"] for site in read(folder / "runs/west/summary.json")["sites"]] == ["north", "south"]
    assert "files that are no image" in read(folder / "runs/west/manifest.json")["absent"]["west"]
    alone = "methods=[{expert: {site: west}}]"
    ended = simulate(folder, *options[:3], "min_sites=2", "--set", alone, "--out", "runs/no-row")
    assert ended.returncode == 2
    assert "method 'expert:west' names site 'west', whose expert is not there: no row is left" in " ".join(ended.stderr.split())
    said = done(folder, *options[:3], "min_sites=2", "--set", "methods=[mean, {expert: {site: west}}]", "--out", "runs/a-row")
    assert "whose expert is not there; the run goes on without its row" in " ".join(said.split())
    late = ("sites=[west]", "events=[{at: 0, join: north}]", "federated=[fedavg]", "methods=[mean]", "min_sites=1")
    ended = simulate(folder, *[word for setting in late for word in ("--set", setting)], "--out", "runs/no-founder")
    assert ended.returncode == 2
    assert "federated: fedavg-5: found no expert of a hospital that is there from the beginning" in " ".join(ended.stderr.split())
