"""Presets: they fill what a scenario leaves out, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmerge.errors import ScenarioError
from fedmerge.experiment.experiment import Experiment, Overrides, load_experiment
from fedmerge.experiment.scenario import PROTOCOLS, Scenario, filled
from tests.front_door import SCENARIO, world

BARE = {"name": "tiny", "sites": ["north", "south"], "target": "mercy"}


def loaded(root: Path, *settings: tuple[str, Any], **content: Any) -> Experiment:
    file = world(root)
    file.write_text(yaml.safe_dump({**BARE, **content}))
    return load_experiment(file, Overrides(settings=settings))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_names_and_a_protocol_make_a_scenario(name: str) -> None:
    scenario = Scenario.model_validate({**BARE, "protocol": name})
    assert scenario.training.batch_size == scenario.stream.batch_size == 32
    assert scenario.training.select == "best"
    written = scenario.model_dump(mode="json")
    assert Scenario.model_validate(written) == scenario  # what a run folder holds reads as the same
    assert filled(written)[1] == []


def test_the_papers_protocol_has_the_ranges_of_diwa_and_the_steps_of_domainbed() -> None:
    scenario = Scenario.model_validate({**BARE, "protocol": "eam"})
    training = scenario.training
    assert (scenario.model.name, scenario.initialization.kind) == ("vit_base_patch32_224", "pretrained")
    assert (training.runs, training.epochs, training.max_steps, training.optimizer) == (20, 50, 5001, "adam")
    drawn = [training.diversity.hyper_parameters(run, "a", 0) for run in range(20)]
    assert drawn[0] == {"lr": 5e-5, "weight_decay": 0, "dropout": 0}
    assert {one["lr"] for one in drawn} == {1e-5, 3e-5, 5e-5}
    assert {one["weight_decay"] for one in drawn[1:]} == {1e-4, 1e-6}
    assert {one["dropout"] for one in drawn[1:]} == {0, 0.1, 0.5}


def test_keys_that_are_given_stay(tmp_path: Path) -> None:
    model = {"name": "vit_tiny_patch16_224", "kwargs": {"img_size": 16, "patch_size": 8, "in_chans": 1}}
    given = {
        "model": model,
        "training": {"epochs": 3, "optimiser": "adamw"},
        "methods": ["mean"],
        "initialisation": SCENARIO["initialization"],
    }
    found = loaded(tmp_path / "a", ("training.runs", 2), protocol="eam", **given)
    training = found.scenario.training
    assert (training.epochs, training.runs, training.optimizer, training.max_steps) == (3, 2, "adamw", 5001)
    assert found.scenario.initialization.kind == "proxy"
    assert found.scenario.model.kwargs == model["kwargs"]
    (said,) = [line for line in found.remarks() if line.startswith("protocol")]
    assert said.startswith("protocol 'eam' gives: training.max_steps, training.batch_size, ")
    assert said.endswith("stream")
    assert not {"training.runs", "training.epochs", "training.optimizer"} & set(found.filled)
    changed = (("protocol", "quick"), ("stream.batch_size", 8), ("methods.eam.gamma", 3), ("model.kwargs.img_size", 64))
    quick = loaded(tmp_path / "b", *changed)
    assert (quick.scenario.backend, quick.scenario.stream.batch_size, quick.scenario.stream.delta) == ("local", 8, 0.1)
    assert (quick.scenario.model.geometry.size, quick.scenario.model.kwargs["depth"]) == (64, 4)
    assert quick.scenario.methods[-1].gamma == 3
    assert "methods" in quick.filled


def test_mistakes_in_or_beside_a_protocol_are_told(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"protocol: found 'paper'; expected 'eam' or 'quick'"):
        loaded(tmp_path / "a", protocol="paper", **{key: SCENARIO[key] for key in ("model", "initialization", "stream", "methods")})
    with pytest.raises(ScenarioError, match=r"training: found 'long'; expected a mapping"):
        loaded(tmp_path / "b", protocol="quick", training="long")
    with pytest.raises(ScenarioError, match=r"line \d+: training\.epoch: found an unknown key; .*did you mean 'epochs'"):
        loaded(tmp_path / "c", protocol="quick", training={"epoch": 3})
