"""Files of weights that were trained elsewhere: what is taken off, put in order or refused."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedmerge.errors import CheckpointError, ScenarioError
from fedmerge.federated.client.site_training import train_site
from fedmerge.federated.messages import Initial, SiteTask
from fedmerge.federated.model import ModelSpec, build
from fedmerge.federated.pool.checkpoint import Brought, fitted, read_weights
from fedmerge.federated.pool.experts import fingerprint
from fedmerge.federated.site import OwnExpert, Site
from fedmerge.system.yaml_loader import check
from tests.hospitals import MODEL

CLASSES = ("cat", "dog", "cow")


@pytest.fixture
def state() -> dict[str, Tensor]:
    return dict(build(MODEL, 3, seed=5).state_dict())


def fit(state: dict[str, Tensor], outputs: Any = None, done: tuple[str, ...] = ()) -> Brought:
    return fitted(Brought("x", state, done), build(MODEL, 3), CLASSES, outputs, "w")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("wrapped", "done"),
    [
        (lambda state: state, ()),
        (lambda state: {"epoch": 3, **state}, ("left out what is no tensor: epoch",)),
        (lambda state: {"model": state, "epoch": 3}, ("taken from 'model'",)),
        (lambda state: {"ema": {"model": state}, "args": {"lr": 1}}, ("taken from 'ema'", "taken from 'model'")),
        (lambda state: {"state_dict": state, "state_dict_ema": state}, ("taken from 'state_dict' (also there: 'state_dict_ema')",)),
    ],
)
def test_files_of_pytorch_are_read_and_unwrapped(
    tmp_path: Path, state: dict[str, Tensor], wrapped: Callable[..., Any], done: tuple[str, ...], zipped: bool
) -> None:
    torch.save(wrapped(state), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    found = read_weights(tmp_path / "w.pth", "key")
    assert found.form == ("PyTorch, zip" if zipped else "PyTorch, pickle")
    assert found.done == done
    assert all(torch.equal(found.state[name], state[name]) for name in state)


def test_what_could_run_code_or_is_torn_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    def refused(file: str) -> str:
        with pytest.raises(CheckpointError, match=f"key: .*{file}: found ") as caught:
            read_weights(tmp_path / file, "key")
        return str(caught.value)

    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, tmp_path / "args.pth")
    assert "Python objects in it (argparse.Namespace), which are not read" in refused("args.pth")
    torch.save(build(MODEL, 3), tmp_path / "module.pth")
    assert "torch.save({'state_dict': model.state_dict()}, FILE)" in refused("module.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"w": [1.0]}))
    assert "a pickle that is not read" in refused("plain.pkl")
    torch.save(state, tmp_path / "whole.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:4000])
    assert "copy it again" in refused("torn.pth")
    torch.save(state["norm.weight"], tmp_path / "tensor.pth")
    assert "found Tensor in it" in refused("tensor.pth")
    torch.save({"a": state, "b": state}, tmp_path / "two.pth")
    assert "several of which hold tensors (a, b)" in refused("two.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    assert "found an empty file" in refused("empty.pth")
    (tmp_path / "page.pth").write_bytes(b"<html>")
    assert "a page of HTML" in refused("page.pth")


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "module.model.", "_orig_mod."])
def test_prefixes_are_stripped_and_said(state: dict[str, Tensor], prefix: str) -> None:
    found = fit({prefix + name: tensor for name, tensor in state.items()})
    assert f"prefix '{prefix}' stripped" in found.done
    assert list(found.state) == list(state)
    some = fit({name if "head" in name else prefix + name: tensor for name, tensor in state.items()})
    assert all(torch.equal(some.state[name], state[name]) for name in state)


@pytest.mark.parametrize("head", ["fc", "classifier.1", "head.fc"])
def test_a_head_of_another_name_is_found(state: dict[str, Tensor], head: str) -> None:
    found = fit({name.replace("head", head): tensor for name, tensor in state.items()})
    assert f"head '{head}' taken as 'head'" in found.done
    assert torch.equal(found.state["head.weight"], state["head.weight"])
    two = {name.replace("head", other): tensor for other in ("fc", "aux") for name, tensor in state.items()}
    with pytest.raises(CheckpointError, match=r"missing: head\.weight"):  # nobody can tell which of the two is meant
        fit(two)


def test_outputs_are_put_in_order(state: dict[str, Tensor]) -> None:
    found = fit(state, ("cow", "cat", "dog"))
    assert torch.equal(found.state["head.weight"], state["head.weight"][[1, 2, 0]])
    assert torch.equal(found.state["head.bias"], state["head.bias"][[1, 2, 0]])
    more = state | {name: torch.cat([state[name], state[name][:2]]) for name in ("head.weight", "head.bias")}
    assert torch.equal(fit(more, ("cat", None, "cow", "dog", None)).state["head.weight"], more["head.weight"][[0, 3, 2]])
    assert "outputs taken in the order cat, dog, cow" in fit(state).done
    for outputs, said in (
        (("cat", "dog"), "found a head of 3 outputs and 2 names for them in 'classes'; expected 3"),
        (("cat", "dog", "crow"), "classes: found 'crow'; expected a class of the scenario: did you mean 'cow'"),
        (("cat", "dog", "dog"), "classes: found 'dog' 2 times, 'cow' 0 times; expected every class of the scenario once"),
        (("cat", "dog", None), "found 'cow' 0 times"),
    ):
        with pytest.raises(CheckpointError, match=said):
            fit(state, outputs)
    with pytest.raises(CheckpointError, match=r"w: found a head of 5 outputs; expected 3"):
        fit(more)
    mapped = OwnExpert.model_validate({"checkpoint": "w", "classes": {"Kuh": "cow", "Katze": "cat", "Hund": "dog"}})
    assert mapped.classes == ("cow", "cat", "dog")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_the_models(state: dict[str, Tensor], dtype: torch.dtype) -> None:
    found = fit({name: tensor.to(dtype) for name, tensor in state.items()})
    assert found.state["norm.weight"].dtype == torch.float32
    assert f"{str(dtype).removeprefix('torch.')} made float32" in found.done
    huge = state | {"norm.weight": torch.full((16,), 1e300, dtype=torch.float64)}
    with pytest.raises(CheckpointError, match=r"values of norm\.weight: found NaN or infinity"):
        fit(huge)


def test_counters_of_batchnorm_are_theta_0s() -> None:
    spec = ModelSpec.model_validate({"name": "resnet10t", "kwargs": {"in_chans": 1}})
    model = build(spec, 3)
    theta_0, own = dict(model.state_dict()), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    counter = next(name for name in own if name.endswith("num_batches_tracked"))
    for change in ({counter: torch.tensor(99)}, {}):
        state = {name: tensor for name, tensor in own.items() if name != counter} | change
        found = fitted(Brought("x", state), model, CLASSES, None, "w", theta_0)
        assert torch.equal(found.state[counter], theta_0[counter])


def test_an_expert_is_known_by_its_contents(tmp_path: Path, initial: Initial, hospital: Callable[..., SiteTask]) -> None:
    plain, classes = hospital("a"), len(hospital("a").classes)
    save_file(build(MODEL, classes, seed=1).state_dict(), tmp_path / "w.safetensors")

    def bring(file: str, **training: Any) -> SiteTask:
        task = hospital("a", **training)
        return task.model_copy(update={"site": task.site.model_copy(update={"expert": OwnExpert(checkpoint=str(tmp_path / file))})})

    first = fingerprint(bring("w.safetensors"))
    assert first != fingerprint(plain)
    assert fingerprint(bring("w.safetensors", epochs=9)) == first  # nobody trains
    (tmp_path / "w.safetensors").rename(tmp_path / "moved")
    assert fingerprint(bring("moved")) == first
    upload = train_site(bring("moved"), initial.weights, lambda *_: None)
    assert sorted(upload.scalars) == ["n", "temperature", "validation_accuracy"]
    assert torch.equal(upload.weights["head.weight"], build(MODEL, classes, seed=1).state_dict()["head.weight"])
    save_file(build(MODEL, classes, seed=2).state_dict(), tmp_path / "moved")
    assert fingerprint(bring("moved")) != first


def test_a_site_file_names_a_file_or_its_digest() -> None:
    source = {"kind": "organ_phantom"}
    for expert in ({}, {"checkpoint": "w", "sha256": "0" * 64}):
        with pytest.raises(ScenarioError, match=r"expert: found .*expected 'checkpoint: FILE', or 'sha256'"):
            check(Site, {"name": "a", "source": source, "expert": expert}, "a.yaml")
    for expert, said in (({"checkpoint": "w", "classes": "cat"}, "a list, e.g. "), ({"checkpoint": "w", "classes": [1]}, "text")):
        with pytest.raises(ScenarioError, match=said):
            check(Site, {"name": "a", "source": source, "expert": expert}, "a.yaml")
