"""What is shipped works as it is: every site and scenario loads, and data that is not there says where to get it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from medmnist import INFO
from PIL import Image
from pydantic import ValidationError

from fedmerge.errors import ScenarioError
from fedmerge.experiment.experiment import Overrides, load_experiment
from fedmerge.experiment.scenario import Scenario, json_schema
from fedmerge.federated.site import Site
from fedmerge.merging.methods._base import METHODS
from fedmerge.system.yaml_loader import check, read_yaml

ROOT = Path(__file__).resolve().parents[2]
SITES = sorted((ROOT / "sites").glob("*.yaml"))
SCENARIOS = sorted((ROOT / "scenarios").glob("*.yaml"))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """Folders with the layout of the real data, filled with noise."""
    rng = np.random.default_rng(0)
    for domain, classes in {
        "wbc/tecom": "eosinophil lymphocyte monocyte neutrophil",
        "wbc/cellavision": "eosinophil lymphocyte monocyte neutrophil",
        "brain-mri/cohort-1": "glioma meningioma none pituitary",
    }.items():
        for label in classes.split():
            (tmp_path / domain / label).mkdir(parents=True)
            for number in range(40):
                Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / domain / label / f"{number}.jpg")
    if "organmnist" in request.node.name:
        medmnist(tmp_path / "medmnist")
    monkeypatch.setenv("FEDMERGE_DATA", str(tmp_path))
    monkeypatch.setenv("FEDMERGE_WEIGHTS", str(tmp_path / "weights.pth"))
    return tmp_path


def medmnist(folder: Path) -> None:
    """As many images as are published, all black."""
    folder.mkdir()
    for dataset in ("organamnist", "organcmnist", "organsmnist"):
        counts: dict[str, int] = INFO[dataset]["n_samples"]
        images = {f"{part}_images": np.zeros((count, 28, 28), np.uint8) for part, count in counts.items()}
        labels = {f"{part}_labels": (np.arange(count) % 11)[:, None].astype(np.uint8) for part, count in counts.items()}
        np.savez(folder / f"{dataset}.npz", **images, **labels)


@pytest.mark.parametrize("file", SITES, ids=lambda file: file.stem)
def test_every_site_is_a_site(file: Path) -> None:
    site = check(Site, read_yaml(file), str(file))
    assert site.name == file.stem
    assert site.title
    assert file.read_text().startswith("# ")


@pytest.mark.parametrize("file", SCENARIOS, ids=lambda file: file.stem)
def test_every_scenario_loads_and_nobody_shares_an_image(file: Path, data: Path) -> None:
    plan = load_experiment(file)
    assert plan.scenario.name == file.stem
    assert plan.scenario.question
    assert len(plan.sites) >= (1 if plan.scenario.model.reads_text else 2)  # a zero-shot model is the other of two


def test_organs_all_has_every_method() -> None:
    held = {method.kind() for method in load_experiment(ROOT / "scenarios" / "organs-all.yaml").scenario.methods}
    assert held == set(METHODS.names)


@pytest.mark.parametrize("name", ["wbc-pretrained", "brain-mri-pretrained"])
def test_weights_that_are_not_named_are_one_clear_message(name: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDMERGE_WEIGHTS")
    with pytest.raises(ScenarioError) as error:
        load_experiment(ROOT / "scenarios" / f"{name}.yaml")
    (problem,) = error.value.problems
    assert problem.key == "initialization.path"
    assert "FEDMERGE_WEIGHTS is not set" in problem.found
    assert "export FEDMERGE_WEIGHTS=" in problem.mend


@pytest.mark.parametrize("name", ["wbc", "brain-mri"])
def test_data_that_is_not_there_is_one_clear_message(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDMERGE_DATA", raising=False)
    with pytest.raises(ScenarioError) as error:
        load_experiment(ROOT / "scenarios" / f"{name}.yaml")
    for problem in error.value.problems:
        assert "FEDMERGE_DATA is not set" in problem.found
        assert "github.com/" in problem.mend


def test_the_command_line_changes_seed_methods_and_sites() -> None:
    overrides = Overrides(seed=5, methods=("eam", "mean"), add_sites=(str(ROOT / "sites/st_anna.yaml"),))
    plan = load_experiment(ROOT / "scenarios/organs.yaml", overrides)
    assert plan.scenario.seed == 5
    assert [method.key for method in plan.scenario.methods] == ["eam", "mean"]
    assert [site.name for site in plan.sites] == ["axial", "coronal", "sagittal", "st_anna"]


def test_a_resolved_scenario_means_the_same() -> None:
    plan = load_experiment(ROOT / "scenarios/organs.yaml")
    resolved = yaml.safe_load(yaml.safe_dump(plan.resolved()))
    sites = [site["name"] for site in resolved["sites"]]
    again = Scenario.model_validate({**resolved, "sites": sites, "target": resolved["target"]["name"]})
    assert again == plan.scenario


def test_the_schema_describes_the_same_keys() -> None:
    schema = json_schema("scenario")
    assert set(schema["properties"]) == set(Scenario.model_fields)
    assert schema["additionalProperties"] is False
    with pytest.raises(ValidationError):
        Scenario.model_validate({"nmae": "x"})


def test_help_is_immediate() -> None:
    code = "import sys, fedmerge.cli.main; assert not {'torch', 'ray', 'flwr', 'timm', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    said = subprocess.run([sys.executable, "-m", "fedmerge.simulate", "--help"], capture_output=True, text=True, check=True).stdout
    for option in ("--out", "--pool", "--methods", "--seed", "--add-site", "--resume", "--quiet"):
        assert option in said
