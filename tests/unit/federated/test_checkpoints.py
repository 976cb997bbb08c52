"""Common files of weights, and what is said of those that cannot be used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fedmerge
from fedmerge.errors import CheckpointError
from fedmerge.federated.model import build
from fedmerge.federated.pool.tensor_file import read_state
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
        (b"\x10" + bytes(60), "header.*cut off or damaged"),
    ],
)
def test_files_that_hold_no_weights(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    assert re.search(
        f"w.safetensors: found .*{said}.*expected a safetensors file of {MODEL.name}", refused(tmp_path / "w.safetensors")
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_pytorch_is_to_be_converted(tmp_path: Path, state: dict[str, Tensor], zipped: bool) -> None:
    torch.save({"state_dict": state}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert "safetensors.torch.save_file(torch.load(FILE, weights_only=True)" in refused(tmp_path / "w.pth")


def test_a_folder_a_torn_file_and_none(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "whole.safetensors")
    assert "found a folder; expected" in refused(tmp_path)
    assert "Name one in it: whole.safetensors" in refused(tmp_path)
    (tmp_path / "torn").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    assert "incomplete metadata, file not fully covered, as of a file that was cut off" in refused(tmp_path / "torn")
    assert "nowhere: No such file or directory" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize("prefix", ["module.", "model.", "state_dict.", "_orig_mod.", "encoder.net."])
def test_a_prefix_on_every_name_is_to_be_stripped(tmp_path: Path, state: dict[str, Tensor], prefix: str) -> None:
    save_file({prefix + name: value for name, value in state.items()}, tmp_path / "w")
    assert re.search(f"names: all begin with '{prefix}', which the model's do not; strip it", refused(tmp_path / "w"))
    assert "missing" not in refused(tmp_path / "w")
    wrapped = nn.ModuleDict({"net": build(MODEL, 3)})
    with pytest.raises(CheckpointError, match=r"the model's all begin with 'net\.', and none here; put it in front"):
        Bank.of(wrapped, [state], head=["net.head.weight", "net.head.bias"])


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
