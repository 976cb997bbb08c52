"""The whole path with real Flower and real Ray, by the real front door, on hospitals of a few patients."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedmerge.experts.site_log import own_log
from fedmerge.merge.method import METHODS
from fedmerge.report.step import Step
from tests.conftest import TINY

pytestmark = pytest.mark.slow

SCENARIO = {
    "name": "tiny",
    "seed": 3,
    "model": TINY,
    "initialisation": {"kind": "proxy", "source": {"kind": "organ_phantom", "images": 60, "patients": 12}, "epochs": 1},
    "sites": ["north", "south"],
    "training": {"runs": 2, "epochs": 2, "optimiser": "adamw", "diversity": {"lr": {"default": 1e-3, "draw": [2e-3]}}},
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


def simulate(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    scenario = [] if options and options[0].endswith(".yaml") else ["scenarios/tiny.yaml"]
    command = [sys.executable, "-m", "fedmerge.simulate", *scenario, *options]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def done(folder: Path, *options: str) -> str:
    ended = simulate(folder, *options)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert ended.stderr == ""
    return ended.stdout


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary but for what the clock says, and who trained when."""
    sites = [{name: value for name, value in site.items() if name != "trained"} for site in summary["sites"]]
    methods = {key: {name: v for name, v in row.items() if name != "seconds"} for key, row in summary["methods"].items()}
    return {**summary, "sites": sites, "methods": methods}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run with a cold pool, and what it printed."""
    folder = tmp_path_factory.mktemp("world") / "here"
    world(folder)
    return folder, done(folder)


def test_a_run_leaves_everything_it_decided(first: tuple[Path, str]) -> None:
    folder, said = first
    run = folder / "runs" / "tiny-3"
    expected = {
        "scenario.yaml",
        "manifest.json",
        "audit.jsonl",
        "batches.jsonl",
        "summary.json",
        "report.html",
        "plots",
        "predictions.npz",
    }
    assert expected <= {path.name for path in run.iterdir()}
    assert "report: runs/tiny-3/report.html" in said
    summary, manifest = read(run / "summary.json"), read(run / "manifest.json")
    assert manifest["status"] == "done"
    assert {"torch", "flwr", "ray", "timm"} <= set(manifest["versions"])
    assert manifest["index_sha256"] == summary["stream"]["index_sha256"]
    assert manifest["experts"] == {site["name"]: site["expert_sha256"] for site in summary["sites"]}
    assert {site["name"]: site["trained"] for site in summary["sites"]} == {"north": True, "south": True}
    assert set(summary["methods"]) == {"mean", "weighted_mean", "expert:north", "expert:south", "ensemble", "dcs", "eam"}
    resolved = yaml.safe_load((run / "scenario.yaml").read_text())
    assert resolved["methods"][-1]["eam"]["rho"] == 0.5  # defaults are written out
    assert not (run / "progress").exists()


def test_the_lines_of_the_batches_add_up_to_the_summary(first: tuple[Path, str]) -> None:
    run = first[0] / "runs" / "tiny-3"
    lines = [Step.parse(line, np.empty((0, 11), np.float32)) for line in (run / "batches.jsonl").read_text().splitlines()]
    summary = read(run / "summary.json")
    for name, row in summary["methods"].items():
        steps = [line for line in lines if line.method == name]
        assert [step.t for step in steps] == list(range(summary["stream"]["batches"]))
        assert sum(step.n for step in steps) == summary["stream"]["samples"]
        assert sum(step.correct for step in steps) / sum(step.n for step in steps) == pytest.approx(row["accuracy"])


def test_what_left_each_site_is_what_was_declared(first: tuple[Path, str]) -> None:
    run = first[0] / "runs" / "tiny-3"
    lines = [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]
    for site in ("north", "south"):
        sent = [line for line in lines if line["site"] == site]
        (entry,) = (first[0] / "pool" / "experts").glob(f"{site}-*")
        (header,) = np.frombuffer((entry / "expert.safetensors").read_bytes()[:8], "<u8")
        stored = (entry / "expert.safetensors").stat().st_size - 8 - int(header)
        assert sum(line["bytes"] for line in sent if line["kind"] == "weights") == stored
        assert sum(line["bytes"] for line in sent if line["kind"] == "samples") == 16 * 16
        assert {line["kind"] for line in sent} == {"weights", "scalar", "samples", "statement"}


def test_a_second_run_trains_nobody_and_says_so(first: tuple[Path, str]) -> None:
    folder, _ = first
    said = done(folder, "--out", "runs/again")
    assert "every expert is in the pool; nobody trains" in said
    again, before = read(folder / "runs/again/summary.json"), read(folder / "runs/tiny-3/summary.json")
    assert not any(site["trained"] for site in again["sites"])
    assert without_times(again) == without_times(before)


def test_the_same_seed_with_a_fresh_pool_gives_the_same_numbers(first: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = first
    world(tmp_path / "there")
    assert done(tmp_path / "there", "--quiet") == ""
    run = tmp_path / "there" / "runs" / "tiny-3"
    assert without_times(read(run / "summary.json")) == without_times(read(folder / "runs/tiny-3/summary.json"))


def test_a_hospital_joins_and_nobody_else_trains(first: tuple[Path, str]) -> None:
    folder, _ = first
    said = done(folder, "--add-site", "sites/east.yaml", "--out", "runs/joined", "--methods", "mean,eam")
    assert "hospitals: east train" in said
    summary = read(folder / "runs/joined/summary.json")
    assert [(site["name"], site["trained"]) for site in summary["sites"]] == [("north", False), ("south", False), ("east", True)]
    before = {site["name"]: site["expert_sha256"] for site in read(folder / "runs/tiny-3/summary.json")["sites"]}
    assert all(site["expert_sha256"] == before[site["name"]] for site in summary["sites"][:2])
    assert set(summary["methods"]) == {"mean", "eam"}
    manifest = read(folder / "runs/joined/manifest.json")
    assert manifest["trained"] == {"north": False, "south": False, "east": True}
    assert {json.loads(line)["site"] for line in lines(folder / "runs" / "joined")} == {"east"}
    assert f"north {before['north'][:12]} (from the pool)" in said


def test_who_is_left_out_might_never_have_been_there(first: tuple[Path, str]) -> None:
    folder, _ = first
    (folder / "scenarios" / "three.yaml").write_text(yaml.safe_dump({**SCENARIO, "sites": ["east", "north", "south"]}))
    done(folder, "scenarios/three.yaml", "--without", "east", "--out", "runs/without")
    run, never = folder / "runs" / "without", folder / "runs" / "tiny-3"
    assert without_times(read(run / "summary.json")) == without_times(read(never / "summary.json"))
    assert same_predictions(run, never)
    assert read(run / "manifest.json")["trained"] == {"north": False, "south": False}
    assert (run / "audit.jsonl").read_text() == ""  # nobody was asked anything


def same_predictions(run: Path, other: Path) -> bool:
    """Bit for bit, and NaN where a row was not there."""
    with np.load(run / "predictions.npz") as a, np.load(other / "predictions.npz") as b:
        return a.files == b.files and all(np.array_equal(a[name], b[name], equal_nan=a[name].dtype.kind == "f") for name in a.files)


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


def test_a_cheat_is_left_out_and_costs_nobody_anything(first: tuple[Path, str]) -> None:
    folder, _ = first
    site = {"name": "cheat", "source": {**PHANTOM, "planes": ["sagittal"]}, "attack": {"scale_head": {"factor": 1000}}}
    (folder / "sites" / "cheat.yaml").write_text(yaml.safe_dump(site))
    past_the_gate = ("--set", "limits.growth=1000")  # so large a factor would not be let into the pool
    said = done(folder, "--add-site", "sites/cheat.yaml", "--out", "runs/cheated", "--methods", "mean,eam", *past_the_gate)
    assert "SIMULATED ATTACKER: site 'cheat' attacks on purpose: scale_head (factor 1000.0)" in said
    assert "DEFENCE calibration: the expert of 'cheat' is left out" in said
    run = folder / "runs" / "cheated"
    found, before = read(run / "summary.json"), read(folder / "runs/tiny-3/summary.json")
    assert {site["name"]: site["left_out"] for site in found["sites"]} == {"north": "", "south": "", "cheat": "calibration"}
    for name in ("mean", "eam"):  # to the last digit what they are without it
        assert found["methods"][name]["accuracy"] == before["methods"][name]["accuracy"]
        assert found["methods"][name]["nll"] == before["methods"][name]["nll"]
    assert read(run / "manifest.json")["vetting"]["left_out"] == {"cheat": "calibration"}
    assert [json.loads(x)["verdict"].split(":")[0] for x in lines(run) if json.loads(x)["kind"] == "verdict"] == ["left out"]
    page = (run / "report.html").read_text()
    assert "Simulated attacker: cheat" in page
    assert "Left out by the check of calibration" in page


def test_a_folder_of_another_scenario_is_refused(first: tuple[Path, str]) -> None:
    ended = simulate(first[0], "--seed", "4", "--out", "runs/tiny-3")
    assert ended.returncode == 2
    assert "holds the run of another scenario (differs in: seed)" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert read(first[0] / "runs/tiny-3/summary.json")["seed"] == 3


def test_images_that_cannot_be_used_cost_no_other_hospital_its_expert(first: tuple[Path, str]) -> None:
    folder, _ = first
    shutil.rmtree(folder / "album", ignore_errors=True)
    for label in yaml.safe_load((folder / "runs/tiny-3/manifest.json").read_text())["classes"]:
        (folder / "album" / "ward" / label).mkdir(parents=True)
        for number in range(3):
            (folder / "album" / "ward" / label / f"{number}.png").write_bytes(b"no image")
    site = {"name": "west", "source": {"kind": "image_folder", "root": "album"}}
    (folder / "sites" / "west.yaml").write_text(yaml.safe_dump(site))
    ended = simulate(folder, "--add-site", "sites/west.yaml", "--out", "runs/west")
    assert ended.returncode == 2
    assert "site 'west'" in ended.stderr
    assert "ward/bladder/0.png" not in ended.stderr  # names of files may be names of patients: the hospital's own log has them
    assert f"in full, at the site: {own_log('west')}" in ended.stderr
    assert "ward/bladder/0.png" in own_log("west").read_text()
    for left in ("manifest.json", "audit.jsonl", "federation.log"):
        assert "bladder/0.png" not in (folder / "runs/west" / left).read_text()
    assert "2 of 3 experts are in the pool" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (folder / "runs/west/summary.json").exists()
    assert read(folder / "runs/west/manifest.json")["status"] == "failed"
    options = ("--add-site", "sites/west.yaml", "--set", "min_sites=2", "--methods", "mean", "--out", "runs/west-or-not")
    said = done(folder, *options)
    assert "site 'west'" in said
    assert "the run goes on without it" in said
    assert [site["name"] for site in read(folder / "runs/west-or-not/summary.json")["sites"]] == ["north", "south"]
    assert "files that are no image" in read(folder / "runs/west-or-not/manifest.json")["absent"]["west"]


def test_every_method_of_the_folder_runs_and_is_labelled(first: tuple[Path, str]) -> None:
    """All methods on one stream, with whatever they need; the experts are those that the first run has trained."""
    folder, _ = first
    target_fisher = {"fisher": {"mode": "target", "samples": 8, "label": "fisher-target"}}
    stream = {"dawin": {"scope": "full", "label": "dawin-full"}}
    everything = {
        **SCENARIO,
        "name": "everything",
        "methods": [*METHODS.names, target_fisher, stream],
        "uploads": [{"fisher": {"samples": 8}}, {"gram": {"samples": 8}}, {"gram_rounds": {"samples": 8}}, "soup"],
    }
    (folder / "scenarios" / "everything.yaml").write_text(yaml.safe_dump(everything))
    said = done(folder, "scenarios/everything.yaml")
    assert "compute fisher, gram, gram_rounds, soup" in said
    summary = read(folder / "runs" / "everything-3" / "summary.json")
    rows = summary["methods"]
    assert set(METHODS.names) - {"expert"} <= set(rows)
    assert not any(site["trained"] for site in summary["sites"])
    assert not rows["oracle"]["ranked"]
    assert not rows["dawin-full"]["ranked"]
    assert rows["dawin-full"]["remark"] == "sees the whole stream before it predicts"
    assert {name for name, row in rows.items() if row["gradient"]} >= {"adamerging", "fisher-target"}
    assert {"fisher", "gram", "gram_rounds", "soup"} <= {json.loads(x)["kind"] for x in lines(folder / "runs" / "everything-3")}
    assert read(folder / "runs" / "everything-3" / "manifest.json")["per_sample"]["taken"]
    report = (folder / "runs" / "everything-3" / "report.html").read_text()
    assert "sees the whole stream before it predicts" in report
    assert "fisher" in report


def fedmerge(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fedmerge.cli import main; main()", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, env=environment)


def test_a_plan_tells_what_is_in_the_pool(first: tuple[Path, str]) -> None:
    told = fedmerge(first[0], "plan", "scenarios/tiny.yaml")
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("in the pool") == 2
    assert "never trains" in told.stdout
    assert "nobody trains" in told.stdout


def test_a_sweep_shares_experts_and_goes_on_where_it_stopped(first: tuple[Path, str]) -> None:
    folder = first[0]
    before = sorted((folder / "pool" / "experts").iterdir())
    options = ("--set", "stream={kind: iid, batch_size: 8},{kind: temporal, batch_size: 8}", "--methods", "mean,eam")
    swept = fedmerge(folder, "sweep", "scenarios/tiny.yaml", *options)
    assert swept.returncode == 0, swept.stderr + swept.stdout
    out = folder / "runs" / "tiny-sweep"
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    wanted = {(kind, method) for kind in ("iid, batch_size 8", "temporal, batch_size 8") for method in ("mean", "eam")}
    assert {(row["stream"], row["method"]) for row in rows} == wanted
    assert "data:image/svg+xml" in (out / "sweep.html").read_text()
    assert sorted((folder / "pool" / "experts").iterdir()) == before
    cells = sorted((out / "cells").iterdir())
    assert len({read(cell / "summary.json")["stream"]["index_sha256"] for cell in cells}) == 2
    again = fedmerge(folder, "sweep", "scenarios/tiny.yaml", *options)
    assert again.returncode == 0, again.stderr
    assert "2 cells, 2 of them done before" in again.stdout
    wrong = fedmerge(folder, "sweep", "scenarios/tiny.yaml", "--set", "methods.eam.gama=1")
    assert wrong.returncode == 2
    assert "did you mean 'gamma'?" in wrong.stderr


def lines(run: Path) -> list[str]:
    return (run / "audit.jsonl").read_text().splitlines()


def test_a_full_disk_is_one_message(first: tuple[Path, str]) -> None:
    folder, _ = first
    command = [sys.executable, "-m", "fedmerge", "mirage", "pool", "--out", "/dev/full"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "the disk is full" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_run_of_an_older_version_is_told_from_another_scenario(first: tuple[Path, str]) -> None:
    folder, _ = first
    shutil.copytree(folder / "runs" / "tiny-3", folder / "older")
    file = folder / "older" / "scenario.yaml"
    resolved = yaml.safe_load(file.read_text())
    del resolved["target"]["shifts"], resolved["sites"][1]["shifts"]
    file.write_text(yaml.safe_dump(resolved))
    ended = simulate(folder, "--out", "older", "--resume")
    assert ended.returncode == 2
    assert "older fedmerge, which did not know sites[1].shifts, target.shifts" in ended.stderr
    assert file.read_text() == yaml.safe_dump(resolved)


def test_a_run_is_diagnosed_from_its_own_experts(first: tuple[Path, str]) -> None:
    folder, _ = first
    command = [sys.executable, "-m", "fedmerge", "diagnose", "runs/tiny-3"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert "barriers between experts, on 80 images" in ended.stdout
    found = read(folder / "runs" / "tiny-3" / "diagnose.json")
    assert {(tuple(row["pair"]), row["part"]) for row in found["barriers"]} == {
        (("north", "south"), part) for part in ("both", "encoder", "head")
    }
    page = (folder / "runs" / "tiny-3" / "diagnose.html").read_text()
    for heading in ("trust", "coefficients", "drift", "barriers"):
        assert f'id="{heading}"' in page
    elsewhere = subprocess.run([*command, "--pool", "nowhere"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert elsewhere.returncode == 2
    assert "name the run's own pool with --pool" in elsewhere.stderr
