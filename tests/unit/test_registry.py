"""A folder is a registry, and older names of keys and plug-ins still say what they said."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedmerge.data.datasets._base import SOURCES
from fedmerge.errors import ScenarioError
from fedmerge.experiment.experiment import load_experiment
from fedmerge.experiment.overrides import Overrides
from fedmerge.federated.site import Site
from tests.front_door import SCENARIO, world


def older(scenario: dict[str, object]) -> dict[str, object]:
    """The same scenario with the spellings of old."""
    found = dict(scenario)
    found["initialisation"] = found.pop("initialization")
    training = dict(found["training"])  # type: ignore[call-overload]
    training["optimiser"] = training.pop("optimizer")
    return found | {"training": training, "defences": ["norms"]}


def test_older_spellings_of_keys_mean_the_same(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    file.write_text(yaml.safe_dump(SCENARIO | {"defenses": ["norms"]}))
    new = load_experiment(file)
    file.write_text(yaml.safe_dump(older(SCENARIO)))
    assert load_experiment(file) == new
    changes = Overrides(settings=(("training.optimiser", "sgd"), ("initialisation.epochs", 2), ("defences", [])))
    changed = load_experiment(file, changes).scenario
    assert (changed.training.optimizer, changed.initialization.epochs, changed.defenses) == ("sgd", 2, ())


def test_a_key_by_both_of_its_names_is_an_error(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    file.write_text(yaml.safe_dump(older(SCENARIO) | {"initialization": SCENARIO["initialization"]}))
    with pytest.raises(ScenarioError, match="initialisation"):
        load_experiment(file)


def test_a_plugin_is_known_by_its_older_name() -> None:
    source = {"labels": ["a", "b"], "parts": ["ward"], "sha256": "0" * 64}
    new, old = (Site.model_validate({"name": "x", "source": {"kind": kind, **source}}) for kind in ("remote", "elsewhere"))
    assert new == old
    assert old.source.kind() == "remote"
    assert SOURCES.aliases == {"elsewhere": "remote"}
    assert "elsewhere" not in SOURCES.names


@pytest.mark.parametrize("key", ["seed", "training.epochs", "methods.ties.density", "target.max_bytes"])
def test_a_truth_is_no_number(key: str, tmp_path: Path) -> None:
    """YAML takes `yes` and `on` for true, which is 1 for Python."""
    file = world(tmp_path / "here")
    file.write_text(yaml.safe_dump(SCENARIO | {"methods": ["mean", "ties"]}))
    with pytest.raises(ScenarioError, match=rf"{key.rpartition('.')[2]}: found True; expected a valid"):
        load_experiment(file, Overrides(settings=((key, True),)))
    load_experiment(file, Overrides(settings=(("methods.mean.with_theta_0", True),)))


@pytest.mark.parametrize("fields", [False, 0, "", []])
def test_a_plugin_is_not_switched_off_by_a_value(fields: object, tmp_path: Path) -> None:
    """`{eam: no}` was `eam`."""
    with pytest.raises(ScenarioError, match=r"methods\[0\]: found {'eam': .*}: a method is its name, or one name with a mapping"):
        load_experiment(world(tmp_path / "here"), Overrides(settings=(("methods", [{"eam": fields}]),)))
    assert load_experiment(world(tmp_path / "there"), Overrides(settings=(("methods", [{"eam": None}]),)))
