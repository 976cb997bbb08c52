"""What a scenario will do, told before it does it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import save_file

from fedmerge.cli.show_plan import show_preview
from fedmerge.experiment.dry_run import Left, ahead, estimate, known_start, previews
from fedmerge.experiment.experiment import load_experiment
from fedmerge.experiment.training_phase import site_task
from fedmerge.federated.client.dataset_summary import census
from fedmerge.federated.model import ModelSpec, build
from fedmerge.federated.pool.global_models import GlobalPool, Stand
from fedmerge.report.terminal import duration, histogram, stripes
from tests.conftest import TINY
from tests.front_door import SCENARIO, world


def test_counts_are_those_of_the_images(tmp_path: Path) -> None:
    plan = load_experiment(world(tmp_path / "here"))
    (found,) = previews([plan], tmp_path / "pool", 2)
    assert [one.site for one in found.sites] == ["north", "south"]
    for one in (*found.sites, found.target):
        assert one.images == sum(one.per_class.values()) == sum(one.per_domain.values()) == 80
        assert one.groups == 16
    assert all(one.train + one.validation == one.images for one in found.sites)
    assert (found.target.train, found.trained) == (0, {"north": None, "south": None})
    assert found.mix.samples + found.mix.unused == 80
    np.testing.assert_allclose(found.mix.classes.sum(1), 1)
    np.testing.assert_allclose(found.mix.domains.sum(1), 1)
    assert found.cost.training_s > 0
    assert not (tmp_path / "pool").exists()


def test_rounds_that_are_left_are_told_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, pool = world(tmp_path / "here"), tmp_path / "pool"
    rounds = [{"fedavg": {"rounds": 3}}, {"fedprox": {"rounds": 4, "epochs": 1, "fraction": 0.5}}, {"fedfisher": {"label": "one"}}]
    classes = len(load_experiment(file).classes)
    save_file(build(ModelSpec.model_validate(TINY), classes).state_dict(), tmp_path / "w.safetensors")
    start = {"kind": "checkpoint", "path": str(tmp_path / "w.safetensors")}  # theta_0 is there, and trains nowhere
    file.write_text(yaml.safe_dump({**SCENARIO, "initialization": start, "federated": rounds}))
    plan = load_experiment(file)
    initial = known_start(plan, pool)
    assert initial is not None
    sites = [census(site, plan.scenario.model.geometry, plan.scenario.seed) for site in plan.sites]
    fedavg, fedprox, fisher = first = ahead(plan, pool, initial, sites)
    per_epoch = {one.site: max(1, one.train // 32) for one in sites}
    assert fedavg.left == fisher.left == {site: 2 * 2 * steps for site, steps in per_epoch.items()}  # 2 runs of 2 epochs
    assert fedprox.left == {site: 4 * 0.5 * steps for site, steps in per_epoch.items()}
    assert (fedavg.asked, fedprox.asked, fedprox.steps) == (3, 2, sum(fedprox.left.values()) / 2)
    assert [one.words for one in first] == ["to train"] * 3
    assert {one.words for one in ahead(plan, pool, None, sites)} == {"known after theta_0"}

    known = GlobalPool(pool, [site_task(plan, number, initial) for number in range(2)])
    for strategy, done in zip(plan.scenario.federated, (2, 4), strict=False):
        known.keep(strategy, Stand(done, initial.weights, {}, ()))
    (found,) = previews([plan], pool, 2)
    assert [one.words for one in found.rounds] == ["2 of 3 rounds in the pool", "in the pool", "to train"]
    assert [one.asked for one in found.rounds] == [1, 0, 1]
    assert 0 < found.rounds[0].left["north"] < fedavg.left["north"]
    assert set(found.rounds[1].left.values()) == {0}
    show_preview(found)
    said = " ".join(capsys.readouterr().out.split())
    assert f"federated: fedavg-3, 3 rounds, {fedavg.steps:.0f} local steps a hospital in all: 2 of 3 rounds in the pool" in said
    assert "federated: one, 1 round," in said

    model = build(plan.scenario.model, classes)
    long = replace(fedavg, left=dict.fromkeys(fedavg.left, 5000.0))  # far more than all else: no clock can turn it round
    without, with_rounds = (estimate(plan, model, sites, Left(0, sites, those), found.mix, 2) for those in ((), (long,)))
    assert with_rounds.training_s > 20 * without.training_s > 0


def test_the_picture() -> None:
    shares = np.stack([np.linspace(1, 0, 8), np.linspace(0, 1, 8)], 1)
    assert stripes(["a", "long"], shares, columns=4) == ["   a |█▓▒░|", "long |░▒▓█|"]
    assert stripes(["a"], np.array([[0.0], [0.5], [1.0]])) == ["a | ▒█|"]
    assert histogram({"a": 0, "b": 1, "c": 8}) == "·▂█"
    assert [duration(s) for s in (0.2, 89, 600, 7200)] == ["1 s", "89 s", "10 min", "2.0 h"]
