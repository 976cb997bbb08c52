"""What `priors` does by the front door: hospitals upload class counts, heads lose their priors, and what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fedmerge.data.datasets.organ_phantom import ORGANS
from tests.front_door import simulate, world


def with_keys(file: Path, **keys: object) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | keys))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pool for all tests: hospitals train once."""
    folder = tmp_path_factory.mktemp("priors")
    scenario = world(folder)
    methods = ["mean", "ensemble", {"posterior": {"label_prior": "batch"}}]
    with_keys(scenario, methods=methods, uploads=["class_counts"])
    with_keys(folder / "sites" / "mercy.yaml", prevalences={organ: 1 + 8 * (organ == "liver") for organ in ORGANS})
    return folder


def accuracies(folder: Path, priors: str) -> dict[str, float]:
    done = simulate(folder, "--set", f"priors={priors}", "--out", f"runs/{priors}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "runs" / priors / "summary.json").read_text())
    return {name: row["accuracy"] for name, row in summary["methods"].items()}


def test_every_way_runs_and_changes_predictions(folder: Path) -> None:
    found = {priors: accuracies(folder, priors) for priors in ("as_trained", "uniform", "declared", "estimated")}
    assert found["uniform"] != found["as_trained"]
    assert found["declared"] != found["uniform"]
    assert all(found[priors].keys() == found["as_trained"].keys() for priors in found)
    items = [json.loads(line) for line in (folder / "runs" / "as_trained" / "audit.jsonl").read_text().splitlines()]
    counts = [item for item in items if "class_counts" in item["item"] or item["kind"] == "class_counts"]
    assert {item["site"] for item in counts} == {"north", "south"}


def test_what_is_missing_is_named(folder: Path) -> None:
    refused = simulate(folder, "--set", "priors=uniform", "--set", "uploads=[]")
    assert refused.returncode == 2
    assert "priors: found 'uniform'; expected 'class_counts' among the uploads" in " ".join(refused.stderr.split())
    with_keys(folder / "sites" / "mercy.yaml", prevalences={"liver": 0.4})
    refused = simulate(folder, "--set", "priors=declared")
    assert refused.returncode == 2
    assert "prevalences of ['liver']" in " ".join(refused.stderr.split())
    refused = simulate(folder, "--set", "priors=learned")
    assert refused.returncode == 2
    assert "learned" in refused.stderr
