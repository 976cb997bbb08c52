"""Common files of weights, and what is said of those that cannot be used."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fedmerge
from fedmerge.cli.weights_file import told_of
from fedmerge.errors import CheckpointError
from fedmerge.federated.model import ModelSpec, build
from fedmerge.federated.pool.checkpoint import read_state
from fedmerge.federated.server.initialization import Checkpoint, initialize
from fedmerge.merging.bank.bank import Bank
from tests.hospitals import MODEL


@pytest.fixture
def state() -> dict[str, Tensor]:
    return dict(build(MODEL, 3).state_dict())


def refused(file: Path) -> str:
    """What is said of a file, by both ways in which a scenario names one."""
    with pytest.raises(CheckpointError) as by_initialization:
        initialize(Checkpoint(kind="checkpoint", path=str(file)), MODEL, 3, 0, file.parent / "pool", lambda *_: None)
    with pytest.raises(CheckpointError) as by_generalist:
        read_state(file, "generalist", MODEL, 3)
    said = str(by_initialization.value)
    assert str(by_generalist.value).replace("generalist", "initialization.path") == said
    return said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 22\n", "a pointer of Git LFS .* 'git lfs pull'"),
        (b"<!DOCTYPE html><html>", "a page of HTML"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"", "an empty file"),
        (b"\xef\xbb\xbf\n <html>", "a page of HTML"),
        (b"Entry not found", "a file of text that begins with 'Entry not found'"),
        (b'{"weight_map": {}}', "a file of text that begins with"),
        (b"\x08\x07\x12\x07pytorch" + b"\xff" * 99, "an ONNX model"),
        (b"\x10", "a file that was cut off after 1 bytes"),
        (b"\x10" + bytes(60), "no weights that are known here"),
    ],
)
def test_files_that_hold_no_weights(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    assert re.search(
        f"w.safetensors: found .*{said}.*expected a safetensors file of {MODEL.name}, or one of PyTorch",
        refused(tmp_path / "w.safetensors"),
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("under", ["", "state_dict", "model"])
def test_a_file_of_pytorch_is_read(tmp_path: Path, state: dict[str, Tensor], zipped: bool, under: str) -> None:
    torch.save({under: state, "epoch": 3} if under else state, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    found = read_state(tmp_path / "w.pth", "generalist", MODEL, 3)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_more_than_tensors_is_never_run(tmp_path: Path, zipped: bool) -> None:
    torch.save(build(MODEL, 3), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert "found Python objects in it" in refused(tmp_path / "w.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth", _use_new_zipfile_serialization=zipped)
    assert "found list in it; expected" in refused(tmp_path / "list.pth")
    torch.save({"state_dict": {"a": 3}}, tmp_path / "int.pth", _use_new_zipfile_serialization=zipped)
    assert "found 'state_dict' in it; expected" in refused(tmp_path / "int.pth")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_array_of_numbers_and_a_zip_that_saving_left_half_done(tmp_path: Path, state: dict[str, Tensor]) -> None:
    name, weights = next((name, tensor) for name, tensor in state.items() if tensor.ndim == 2)
    odd = {
        "on the device 'meta'": weights.to("meta"),
        "as a quantized tensor": torch.quantize_per_tensor(weights, 0.1, 0, torch.qint8),
        "as a nested tensor": torch.nested.nested_tensor(list(weights)),
    }
    for said, tensor in odd.items():
        torch.save({**state, name: tensor}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=f"found {name} {said}"):
            list(told_of(tmp_path / "w.pth", None, None))
    with pytest.raises(NotImplementedError):
        torch.save({**state, name: weights.to("meta").untyped_storage()}, tmp_path / "half.pth")
    assert "found a zip of PyTorch that lacks data/" in refused(tmp_path / "half.pth")
    with pytest.raises(NotImplementedError):
        torch.save({name: weights.to_mkldnn()}, tmp_path / "none.pth")
    assert "found a zip of PyTorch that lacks data.pkl, as where saving failed" in refused(tmp_path / "none.pth")


def called_otherwise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, as another program calls them."""
    return {f"layer{number}.{name.rpartition('.')[2]}": value for number, (name, value) in enumerate(state.items())}


def theta_0(file: Path, match: str, **model: Any) -> dict[str, Tensor]:
    spec = Checkpoint.model_validate({"kind": "checkpoint", "path": str(file), "match": match})
    return initialize(spec, ModelSpec.model_validate(SMALL | model), 3, 0, file.parent / "pool", lambda *_: None).weights


SMALL = {"name": "resnet10t", "size": 32}


def test_tensors_are_matched_by_their_order(tmp_path: Path) -> None:
    state = dict(build(ModelSpec.model_validate(SMALL), 7, seed=3).state_dict())
    torch.save(called_otherwise(state), tmp_path / "w.pth")
    found = theta_0(tmp_path / "w.pth", "order")
    assert list(found) == list(state)
    assert found["fc.weight"].shape == (3, 512)
    assert all(torch.equal(found[name], state[name]) for name in state if not name.startswith("fc."))
    with pytest.raises(CheckpointError, match="in order of the model's number, kinds and shapes: say 'match: order'"):
        theta_0(tmp_path / "w.pth", "names")


def test_an_order_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    state = called_otherwise(dict(build(ModelSpec.model_validate(SMALL), 3).state_dict()))
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="safetensors files keep no order, only names"):
        theta_0(tmp_path / "w.safetensors", "order")
    torch.save(dict(list(state.items())[:-1]), tmp_path / "fewer.pth")
    with pytest.raises(CheckpointError, match=f"found {len(state) - 1} tensors, expected {len(state)}"):
        theta_0(tmp_path / "fewer.pth", "order")
    first, second, *others = state.items()
    torch.save(dict([second, first, *others]), tmp_path / "swapped.pth")
    with pytest.raises(CheckpointError, match=r"tensor 1 is 'layer1.weight' .*expected one for 'conv1.0.weight'"):
        theta_0(tmp_path / "swapped.pth", "order")
    at = next(number for number, name in enumerate(state) if name.endswith("bias"))
    items = list(state.items())
    items[at - 1], items[at] = items[at], items[at - 1]  # weight and bias of a normalization have one shape
    torch.save(dict(items), tmp_path / "kinds.pth")
    with pytest.raises(CheckpointError, match=f"tensor {at} is 'layer{at}.bias'"):
        theta_0(tmp_path / "kinds.pth", "order")


def test_a_folder_a_torn_file_and_none(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "whole.safetensors")
    assert "found a folder; expected" in refused(tmp_path)
    assert "Name one in it: whole.safetensors" in refused(tmp_path)
    (tmp_path / "torn").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    whole = (tmp_path / "whole.safetensors").stat().st_size
    assert f"found 5000 bytes of a file that says it has {whole}: copy it again" in refused(tmp_path / "torn")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    assert "found arrays of NumPy" in refused(tmp_path / "arrays.npz")
    os.mkfifo(tmp_path / "pipe")
    assert "found a pipe or a device" in refused(tmp_path / "pipe")
    assert "nowhere: found nothing that can be opened (No such file or directory)" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize("prefix", ["module.", "model.", "state_dict.", "_orig_mod.", "encoder.net."])
def test_a_prefix_on_every_name_is_to_be_stripped(tmp_path: Path, state: dict[str, Tensor], prefix: str) -> None:
    save_file({prefix + name: value for name, value in state.items()}, tmp_path / "w")
    assert re.search(f"names: all begin with '{prefix}', which the model's do not; strip it", refused(tmp_path / "w"))
    assert "missing" not in refused(tmp_path / "w")
    wrapped = nn.ModuleDict({"net": build(MODEL, 3)})
    with pytest.raises(CheckpointError, match=r"the model's all begin with 'net\.', and none here; put it in front"):
        Bank.of(wrapped, [state], head=["net.head.weight", "net.head.bias"])


def test_a_prefix_is_found_among_other_names(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file({f"model.{name}": value for name, value in state.items()} | {"epoch": torch.ones(1)}, tmp_path / "w")
    said = refused(tmp_path / "w")
    assert "names: most begin with 'model.', which the model's do not; strip it" in said
    assert "if name.startswith('model.')}" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"img_size": 64}, "pos_embed: .* \\(a position embedding of another img_size or patch_size\\)"),
        ({"in_chans": 3}, "patch_embed.proj.weight: .* \\(made for images of 3 channels: in_chans\\)"),
    ],
)
def test_a_shape_is_told_with_what_lies_behind_it(state: dict[str, Tensor], change: dict[str, Any], said: str) -> None:
    model = build(ModelSpec.model_validate({"name": MODEL.name, "kwargs": MODEL.kwargs | change}), 3)
    with pytest.raises(CheckpointError, match=said):
        Bank.of(build(MODEL, 3), [state, model.state_dict()])
    with pytest.raises(CheckpointError, match=r"head.weight: found \(5, .* \(a head of 5 classes\)"):
        Bank.of(build(MODEL, 3), [state, build(MODEL, 5).state_dict()])


def test_what_is_no_state_dict_is_told_by_every_door(state: dict[str, Tensor]) -> None:
    model = build(MODEL, 3)
    for given, said in (
        ({"state_dict": state}, r"found dict under 'state_dict'; .* checkpoint\['state_dict'\]"),
        (model, "Give module.state_dict"),
        ("w.pth", "found str; expected a state dict"),
        ({**state, "epoch": 3}, "found int under 'epoch'; expected a tensor"),
        ({name: value.to("meta") for name, value in state.items()}, "on the device 'meta'"),
    ):
        for use in (Bank.of, fedmerge.merge, partial(fedmerge.Adapter, method="eam")):
            with pytest.raises(CheckpointError, match=said):
                use(model, [state, given])  # type: ignore[operator]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(torch.relu(self.first(x.flatten(1)))))  # type: ignore[no-any-return]


def test_weights_that_the_model_ties_and_that_have_come_apart_are_refused() -> None:
    """One of the two would be dropped. Copies that are equal are those of a model that was saved and read."""
    state = {name: value.clone() for name, value in Tied().state_dict().items()}
    Bank.of(Tied(), [state])
    apart = state | {"second.weight": state["second.weight"] + 1}
    said = r"untied: second\.weight and first\.weight are one tensor of this model, and differ here by up to 1"
    for use in (lambda: Bank.of(Tied(), [state, apart]), lambda: fedmerge.merge(Tied(), [state, apart])):
        with pytest.raises(CheckpointError, match=said):
            use()
    with pytest.raises(CheckpointError, match="theta_0 does not fit"):
        Bank.of(Tied(), [state], apart)
    with pytest.raises(CheckpointError, match=r"tied: second.weight is first.weight in this model; give its tensor under both"):
        Bank.of(Tied(), [{name: value for name, value in state.items() if name != "second.weight"}])
