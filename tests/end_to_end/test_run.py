"""The whole path by the front door, in this process, on hospitals of a few patients."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import fedmerge
from fedmerge.report.batch_log import Step
from tests.front_door import done, read, same_predictions, simulate, without_times, world

pytestmark = pytest.mark.slow


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


def test_a_folder_of_another_scenario_is_refused(first: tuple[Path, str]) -> None:
    ended = simulate(first[0], "--seed", "4", "--out", "runs/tiny-3")
    assert ended.returncode == 2
    assert "found the run of another scenario (differs in: seed)" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert read(first[0] / "runs/tiny-3/summary.json")["seed"] == 3


def test_what_a_notebook_has_set_changes_no_run(first: tuple[Path, str]) -> None:
    folder, _ = first
    torch.set_default_dtype(torch.float64)
    try:
        with contextlib.chdir(folder), torch.inference_mode(), torch.device("meta"):
            fedmerge.run("scenarios/tiny.yaml", out="runs/set", pool="fresh", quiet=True)
            assert torch.is_inference_mode_enabled()
            assert torch.zeros(1).is_meta
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert read(folder / "runs/set/manifest.json")["trained"] == {"north": True, "south": True}
    assert same_predictions(folder / "runs" / "set", folder / "runs" / "tiny-3")


def test_a_notebook_gets_the_run_of_the_command(first: tuple[Path, str]) -> None:
    folder, _ = first
    with contextlib.chdir(folder):
        result = fedmerge.run("scenarios/tiny.yaml", out="runs/notebook", quiet=True)
        assert all(f"<tr><td>{row['method']}</td>" in result._repr_html_() for row in result.table)
        assert result.report_path.is_file()
        with pytest.raises(fedmerge.FedmergeError, match="did you mean 'epochs'"):
            fedmerge.run("scenarios/tiny.yaml", settings={"training.epoch": 3}, out="runs/wrong")
        wrong: dict[str, tuple[Any, str]] = {
            "threads": ("two", "found 'two'; expected a valid integer"),
            "quiet": ("yes", "found 'yes'; expected a valid boolean"),
            "methods": ("mean", r"found 'mean'; expected a list, e\.g\. \[mean\]"),
            "add_sites": ("sites/north.yaml", "found 'sites/north.yaml'; expected a list"),
            "settings": ("seed=1", "found 'seed=1'; expected a mapping of keys to values"),
            "log": (("wandb",), "found 'wandb'; expected 'tensorboard' or 'mlflow'"),
            "pool": (None, "found None; expected"),
            "quit": (True, "found an unknown key; expected a known one; did you mean 'quiet'"),
        }
        for name, (value, said) in wrong.items():
            with pytest.raises(fedmerge.FedmergeError, match=rf"- fedmerge\.run: {name}(\[0\])?: {said}"):
                fedmerge.run("scenarios/tiny.yaml", **{name: value})
    assert same_predictions(folder / "runs" / "notebook", folder / "runs" / "tiny-3")
    accuracies = [row["accuracy"] for row in result.table]
    assert accuracies == sorted(accuracies, reverse=True)
    assert {row["method"] for row in result.table} == set(result.summary["methods"])
