"""Training at one site: diverse runs, selection, soups, temperature; the same bits for the same seed."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fedmerge.errors import SiteError
from fedmerge.federated.client.augmentation import augment
from fedmerge.federated.client.diwa import Run, select, soup
from fedmerge.federated.client.site_training import open_ward, train_site
from fedmerge.federated.client.temperature import fit_temperature
from fedmerge.federated.client.trainer import LabeledImages, Recipe, fit, logits_of
from fedmerge.federated.messages import MILD, Diversity, Draw, Initial, Job, SiteTask, Strength
from fedmerge.federated.model import ModelSpec, build, train_mode
from fedmerge.federated.security.audit import state_digest
from fedmerge.federated.server.in_process import LocalBackend
from fedmerge.federated.server.initialization import Initialization, initialize
from fedmerge.federated.statistics._base import Ground, State
from fedmerge.federated.statistics.fisher import FisherInformation
from fedmerge.federated.statistics.gram import Gram
from fedmerge.federated.statistics.kfac import Kfac
from tests.hospitals import MODEL


def trained(task: SiteTask, initial: Initial) -> str:
    return state_digest(train_site(task, initial.weights, lambda *_: None).weights)


@pytest.mark.parametrize("strength", ["none", "full"])
def test_batches_from_pixels_are_those_of_all_images_as_floats(hospital: Callable[..., SiteTask], strength: Strength) -> None:
    """In training, in validation, and in statistics: the same bits."""
    ward, model = open_ward(hospital("north"))
    whole, trained, statistics = LabeledImages(ward.train.x[:], ward.train.y), [], []
    recipe = Recipe(1e-3, 0, 12, 16, "adamw", "cosine", strength, flips=True)
    for data in (ward.train, whole):
        net = copy.deepcopy(model)
        fit(net, data, recipe, 7, lambda _: None)
        trained.append([*net.state_dict().values(), logits_of(net, data.x, 16)])
        statistics.append(
            [kind(samples=20).measure(Ground(net.eval(), data.x, data.y, list, (), 3)) for kind in (FisherInformation, Gram, Kfac)]
        )
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))
    for one, other in zip(*statistics, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_seed_gives_the_same_bits(hospital: Callable[..., SiteTask], initial: Initial) -> None:
    task = hospital("north")
    first = trained(task, initial)
    torch.manual_seed(123)  # whatever others do to the global generator
    assert trained(task, initial) == first
    assert trained(task.model_copy(update={"seed": 1}), initial) != first


def test_every_run_reports_and_the_best_is_sent(hospital: Callable[..., SiteTask], initial: Initial) -> None:
    ticks: list[tuple[int, int, str]] = []
    upload = train_site(hospital("north", runs=3), initial.weights, lambda *tick: ticks.append(tick))
    accuracies = [upload.scalars[f"runs.{run}.validation_accuracy"] for run in range(3)]
    assert upload.scalars["validation_accuracy"] == max(accuracies)
    assert upload.scalars["runs.0.lr"] == 1e-3
    assert {upload.scalars[f"runs.{run}.lr"] for run in (1, 2)} == {2e-3}
    done, total, text = ticks[-1]
    assert done == total
    assert text.startswith("run 3/3")
    assert upload.samples is None


def run(value: float, accuracy: float) -> Run:
    return Run({"w": torch.tensor([value]), "steps": torch.tensor(int(value))}, accuracy, {})


def test_selection_by_hand() -> None:
    runs = [run(0.0, 0.6), run(4.0, 0.9), run(8.0, 0.9), run(1.0, 0.7)]
    assert select(runs, "best", lambda _: 0.0)["w"].item() == 4  # the first of the best
    assert select(runs, "uniform", lambda _: 0.0)["w"].item() == 13 / 4

    def near_five(state: State) -> float:
        return -abs(float(state["w"]) - 5)

    # Falling accuracy: 4, 8, 1, 0. Means: 4 (-1), 6 (-1: kept, ties are accepted), 13/3 (-0.67: kept), 13/4 (-1.75: not).
    assert select(runs, "greedy", near_five)["w"].item() == pytest.approx(13 / 3)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6))
def test_a_soup_is_the_mean_and_leaves_counters_alone(values: Sequence[float]) -> None:
    mixed = soup([run(value, 0.0).state for value in values])
    assert float(mixed["w"]) == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert mixed["steps"].item() == int(values[0])


def test_the_temperature_is_the_best_of_a_fine_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(400, 5, generator=generator, dtype=torch.float64)
    y = torch.multinomial((z / 2.5).softmax(1), 1, generator=generator).squeeze(1)
    found = fit_temperature(z.float(), y)
    grid = torch.logspace(math.log10(0.05), math.log10(20), 4001, dtype=torch.float64)
    losses = torch.stack([F.cross_entropy(z / t, y) for t in grid])
    assert found == pytest.approx(float(grid[losses.argmin()]), rel=2e-3)
    assert found == pytest.approx(2.5, rel=0.25)


def test_the_temperature_stays_in_range() -> None:
    z = torch.tensor([[0.5, 0.0], [0.0, 0.5]])
    assert fit_temperature(z, torch.tensor([0, 1])) == pytest.approx(0.05, rel=1e-2)
    assert fit_temperature(z, torch.tensor([1, 0])) == pytest.approx(20, rel=1e-2)


def test_diverse_runs_begin_with_the_defaults() -> None:
    diversity = Diversity(lr=Draw(default=0.5, draw=(0.1, 0.2)))
    assert diversity.hyper_parameters(0, "north", 0) == {"lr": 0.5, "weight_decay": 0.0, "dropout": 0.0}
    drawn = [diversity.hyper_parameters(number, "north", 0) for number in range(1, 40)]
    assert {row["lr"] for row in drawn} == {0.1, 0.2}
    assert {row["dropout"] for row in drawn} == set(MILD["dropout"].draw)
    assert drawn == [diversity.hyper_parameters(number, "north", 0) for number in range(1, 40)]
    assert drawn != [diversity.hyper_parameters(number, "south", 0) for number in range(1, 40)]
    wide = [Diversity(space="wide").hyper_parameters(number, "north", 0) for number in range(1, 40)]
    assert all(1e-5 <= row["lr"] <= 10**-3.5 and 1e-6 <= row["weight_decay"] <= 1e-2 for row in wide)
    sizes = [row["batch_size"] for row in wide]
    assert all(size == int(size) and 8 <= size <= 45 for size in sizes)  # int(2^U(3, 5.5))
    assert min(sizes) < 12
    assert max(sizes) > 32
    assert "batch_size" not in Diversity(space="wide").hyper_parameters(0, "north", 0)  # the training's
    assert all("batch_size" not in row for row in drawn)


def test_batch_norm_is_frozen_in_training() -> None:
    model = train_mode(build(ModelSpec(name="resnet18", kwargs={"in_chans": 1}), 3))
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    model(torch.randn(4, 1, 32, 32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())
    assert model.training


@pytest.mark.parametrize("flips", [True, False])
def test_augmentation_flips_only_where_it_may(flips: bool) -> None:
    x = torch.linspace(-1, 1, 16).expand(256, 1, 16, 16)
    views = augment(x, "full", flips, torch.Generator().manual_seed(0))
    rising = (views[..., -1] > views[..., 0]).float().mean()
    assert views.shape == x.shape
    assert rising == 1 if not flips else 0.3 < rising < 0.7


def test_augmentation_repeats_and_none_is_none() -> None:
    x = torch.randn(8, 3, 16, 16)
    first, second = (augment(x, "light", True, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(augment(x, "none", True, torch.Generator()), x)


def test_weights_that_are_too_large_to_start_from_are_told(hospital: Callable[..., SiteTask]) -> None:
    task = hospital("north")
    too_large = {name: tensor * 1e30 for name, tensor in build(MODEL, len(task.classes)).state_dict().items()}
    with pytest.raises(SiteError, match="run 1 has no finite loss before its first step: the weights that it starts from"):
        train_site(task, too_large, lambda *_: None)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_training_that_diverges_stops_there_and_is_told(
    hospital: Callable[..., SiteTask], job: Callable[..., Job], jobs: int
) -> None:
    task = hospital("north", epochs=100_000, diversity={"lr": {"default": 1e30, "draw": [1e30]}})
    outcome = LocalBackend(jobs=jobs).gather(job(task), lambda _: None)["north"]
    assert re.fullmatch(r"training diverged in run [12], step \d \(lr 1e\+30\): lower training\.diversity\.lr", outcome.reason)


@pytest.mark.parametrize("lr", [1e30, 1e12])  # at 1e12 the weights stay finite, and what they say of an image does not
def test_a_proxy_that_diverges_is_told(tmp_path: Path, lr: float) -> None:
    proxy = {"kind": "proxy", "source": {"kind": "organ_phantom", "images": 60, "patients": 12}, "lr": lr, "epochs": 1}
    with pytest.raises(SiteError, match=r"diverged in the proxy, step \d \(lr 1e\+\d\d\): lower initialization.lr"):
        initialize(TypeAdapter(Initialization).validate_python(proxy), MODEL, 3, 0, tmp_path, lambda *_: None)
