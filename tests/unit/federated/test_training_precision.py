"""The precision of training: of forwards and losses alone. What is uploaded is float32, laid out as always."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmerge.federated.client.round import train_round
from fedmerge.federated.client.site_training import train_site
from fedmerge.federated.client.trainer import LabeledImages, Recipe, channels_last, fit, state_of
from fedmerge.federated.messages import Arithmetic, Initial, SiteTask, Training
from fedmerge.federated.model import ClipSpec, ModelSpec, build, train_mode
from fedmerge.federated.pool.experts import ExpertPool, fingerprint
from fedmerge.federated.security.audit import state_digest
from fedmerge.federated.strategies._base import STRATEGIES, Optimizer
from fedmerge.merging.bank.layout import Parts
from tests.front_door import done, read, simulate, world
from tests.hospitals import MODEL

Hospital = Callable[..., SiteTask]
OTHERS: tuple[Arithmetic, ...] = ("float32_channels_last", "bfloat16")
RESNET = ModelSpec(name="resnet10t", size=32)
GROUPED = ModelSpec(name="tf_efficientnet_lite0", size=32)


def some_images(spec: ModelSpec = RESNET) -> LabeledImages:
    rng, (side, channels) = torch.Generator().manual_seed(0), spec.geometry
    return LabeledImages(torch.randn(12, channels, side, side, generator=rng), torch.randint(0, 3, (12,), generator=rng))


def trained(model: nn.Module, data: LabeledImages, **recipe: Any) -> dict[str, Tensor]:
    """A copy of the model after three steps."""
    net = copy.deepcopy(model)
    whole = {"optimizer": "sgd", "schedule": "constant", "augment": "none", "flips": False, **recipe}
    fit(net, data, Recipe(1e-2, 1e-4, 3, 4, **whole), 5, lambda _: None)
    return dict(net.state_dict())


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("spec", [MODEL, RESNET], ids=["vit", "resnet"])
def test_float32_has_the_bits_of_a_plain_loop(spec: ModelSpec, optimizer: Optimizer) -> None:
    data, start = some_images(spec), build(spec, 3)
    found = trained(start, data, optimizer=optimizer, clip=0.5)
    plain = train_mode(copy.deepcopy(start))
    parameters = list(plain.parameters())
    update: torch.optim.Optimizer
    match optimizer:
        case "adam":
            update = torch.optim.Adam(parameters, 1e-2, weight_decay=1e-4, foreach=False)
        case "adamw":
            update = torch.optim.AdamW(parameters, 1e-2, weight_decay=1e-4, foreach=False)
        case "sgd":
            update = torch.optim.SGD(parameters, 1e-2, momentum=0.9, weight_decay=1e-4, foreach=False)
    assert isinstance(data.x, Tensor)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    for chosen in order.split(4):
        update.zero_grad()
        F.cross_entropy(plain(data.x[chosen]), data.y[chosen]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 0.5, foreach=False)
        update.step()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of switching oneDNN
@pytest.mark.parametrize("precision", OTHERS)
@pytest.mark.parametrize("spec", [RESNET, GROUPED], ids=["plain", "grouped"])
def test_other_precisions_train_about_the_same_and_leave_the_model_as_it_was(spec: ModelSpec, precision: Arithmetic) -> None:
    """Also on a processor without arithmetic of bfloat16, for which torch has slow kernels of its own."""
    data, start = some_images(), build(spec, 3)
    usual = trained(start, data)
    with torch.backends.mkldnn.flags(enabled=precision != "bfloat16"):  # type: ignore[no-untyped-call]
        first, again = (trained(start, data, precision=precision) for _ in range(2))
    for name, tensor in start.state_dict().items():
        assert (first[name].dtype, first[name].shape, first[name].is_contiguous()) == (tensor.dtype, tensor.shape, True)
        assert torch.equal(first[name], again[name])
    way, apart = (
        torch.cat([(one[name] - other[name]).flatten() for name in Parts.of(start).encoder])
        for one, other in ((usual, dict(start.state_dict())), (first, usual))
    )
    assert 0 < apart.norm() < (0.5 if precision == "bfloat16" else 1e-2) * way.norm()


@pytest.mark.parametrize("fails", [False, True])
def test_the_layout_is_that_of_the_training_alone(fails: bool) -> None:
    """Checkpoints on the way are laid out as always, and so is the model afterwards, also after an error."""
    model, seen = build(RESNET, 3), list[bool]()

    def visit(step: int) -> None:
        seen.append(all(tensor.is_contiguous() for tensor in model.parameters()))
        assert all(tensor.is_contiguous() for tensor in state_of(model).values())
        if fails:
            raise OSError("the disk is full")

    recipe = Recipe(1e-2, 0, 2, 4, "adamw", "constant", "none", False, precision="float32_channels_last")
    try:
        fit(model, some_images(), recipe, 0, visit)
    except OSError:
        assert fails
    assert not any(seen)
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())


def test_bfloat16_puts_channels_last_where_that_is_faster() -> None:
    plain, grouped = build(RESNET, 3), build(GROUPED, 3)
    assert [channels_last(plain, one) for one in ("float32", *OTHERS)] == [False, True, True]
    assert [channels_last(grouped, one) for one in ("float32", *OTHERS)] == [False, True, False]


@pytest.mark.parametrize("select", ["best", "uniform"])
def test_an_upload_has_the_same_arrays_in_float32(select: str, hospital: Hospital, initial: Initial) -> None:
    uploads = [
        train_site(hospital("north", select=select, precision=precision), initial.weights, lambda *_: None)
        for precision in ("float32", "bfloat16")
    ]
    layouts = [{name: (one.dtype, one.shape) for name, one in upload.weights.items()} for upload in uploads]
    assert layouts[0] == layouts[1]
    assert list(uploads[0].weights) == list(uploads[1].weights)
    assert uploads[0].scalars.keys() == uploads[1].scalars.keys()
    assert state_digest(uploads[0].weights) != state_digest(uploads[1].weights)


def test_rounds_train_with_it(hospital: Hospital, initial: Initial) -> None:
    strategy = STRATEGIES.load("fedprox")(rounds=1, epochs=1)
    digests = set()
    for precision in ("float32", "bfloat16"):
        task = hospital("north", precision=precision).model_copy(update={"federated": (strategy,)})
        upload = train_round(task, initial.weights, (strategy.key, "1"), lambda *_: None)
        assert {name: one.dtype for name, one in upload.weights.items()} == {n: one.dtype for n, one in initial.weights.items()}
        digests.add(state_digest(upload.weights))
    assert len(digests) == 2


@pytest.mark.parametrize("how", [{"tune": "both"}, {"head": "ft"}, {"head": "lp_ft"}], ids=["both", "ft", "lp_ft"])
def test_a_clip_trains_with_it(how: dict[str, Any], hospital: Hospital) -> None:
    sizes = {"vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}}
    sizes["text_cfg"] = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    spec = ClipSpec(name="ViT-B-32", kwargs={"embed_dim": 16, **sizes}, **how)
    task = hospital("north", precision="bfloat16", runs=1, epochs=1).model_copy(update={"model": spec})
    start = build(spec, len(task.classes)).state_dict()
    weights = train_site(task, start, lambda *_: None).weights
    assert {name: one.dtype for name, one in weights.items()} == {name: one.dtype for name, one in start.items()}
    assert any(not torch.equal(weights[name], start[name]) for name in start)


def test_what_is_said_of_float32_is_what_older_versions_said(hospital: Hospital) -> None:
    """So their experts stay in the pool, their runs can go on, and their hospitals understand what they are asked."""
    said, unsaid = hospital("north", precision="float32"), hospital("north")
    assert fingerprint(said) == fingerprint(unsaid)
    assert "precision" not in unsaid.model_dump_json()
    other = hospital("north", precision="bfloat16")
    assert SiteTask.model_validate_json(other.model_dump_json()) == other
    assert Training.model_validate(unsaid.training.model_dump()).precision == "float32"


def test_a_run_says_how_its_hospitals_trained(tmp_path: Path) -> None:
    world(tmp_path)
    small = ("--methods", "mean", "--set", "training.runs=1")
    half = ("--set", "training.precision=bfloat16")
    done(tmp_path, *small, "--out", "usual")
    done(tmp_path, *small, *half, "--out", "half")
    manifests = [read(tmp_path / folder / "manifest.json") for folder in ("usual", "half")]
    assert [manifest["training_precision"] for manifest in manifests] == ["float32", "bfloat16"]
    assert all(manifests[0]["experts"][site] != digest for site, digest in manifests[1]["experts"].items())
    again = done(tmp_path, *small, *half, "--out", "half", "--resume")
    assert "nobody trains" in again
    refused = simulate(tmp_path, *small, "--out", "half", "--resume")
    assert refused.returncode == 2
    assert "differs in: training" in refused.stderr
    assert len(list((ExpertPool(tmp_path / "pool").path / "experts").iterdir())) == 4


@pytest.mark.parametrize("value", ["float16", "bf16", "16", "channels_last", "null"])
def test_another_word_is_refused_with_those_that_there_are(value: str, tmp_path: Path) -> None:
    world(tmp_path)
    refused = simulate(tmp_path, "--set", f"training.precision={value}")
    assert refused.returncode == 2
    assert "training.precision" in refused.stderr
    assert "'float32', 'float32_channels_last' or 'bfloat16'" in refused.stderr
