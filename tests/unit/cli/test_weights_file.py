"""What `fedmerge inspect` says of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from fedmerge.cli.weights_file import told_of
from fedmerge.data.datasets.organ_phantom import ORGANS
from fedmerge.federated.model import ModelSpec, build
from tests.front_door import fedmerge, world
from tests.hospitals import MODEL


@pytest.fixture
def state() -> dict[str, Tensor]:
    return dict(build(MODEL, len(ORGANS)).state_dict())


def test_a_file_and_a_scenario(tmp_path: Path, state: dict[str, Tensor]) -> None:
    scenario, file = world(tmp_path / "here"), tmp_path / "w.pth"
    torch.save({"model": {f"module.{name}": tensor.half() for name, tensor in state.items()}}, file)
    said = fedmerge(tmp_path, "inspect", str(file), "--scenario", str(scenario))
    assert said.returncode == 0, said.stderr
    first, *rest = said.stdout.splitlines()
    assert first.startswith(f"{file}: PyTorch, zip, ")
    assert rest[:3] == [
        "taken from 'model'",
        f"{len(state)} tensors of {sum(tensor.numel() for tensor in state.values()):,} numbers: {len(state)} float16",
        "head: module.head, 11 outputs of 16 features",
    ]
    assert rest[3].startswith(f"fits {scenario}: vit_tiny_patch16_224, classes bladder, ")
    assert "prefix 'module.' stripped; outputs taken in the order" in rest[3]


def test_what_does_not_fit_ends_with_2(tmp_path: Path, state: dict[str, Tensor]) -> None:
    scenario = world(tmp_path / "here")
    save_file(dict(build(MODEL, 3).state_dict()), tmp_path / "w.safetensors")
    wrong = fedmerge(tmp_path, "inspect", "w.safetensors", "--scenario", str(scenario))
    assert wrong.returncode == 2
    assert "head: head, 3 outputs of 16 features" in wrong.stdout
    assert "found a head of 3 outputs; expected 11. Say with 'classes' of 'expert'" in wrong.stderr
    site = tmp_path / "here" / "sites" / "north.yaml"
    expert = {"checkpoint": str(tmp_path / "w.safetensors"), "classes": list(ORGANS[:3])}
    site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "expert": expert}))
    assert fedmerge(tmp_path, "inspect", "w.safetensors", "--scenario", str(scenario)).returncode == 2
    save_file(state | {"norm.weight": state["norm.weight"] / 0}, tmp_path / "w.safetensors")
    assert "NaN or infinity in 'norm.weight'" in fedmerge(tmp_path, "inspect", "w.safetensors").stdout
    for name, said in (("nowhere", "No such file or directory"), ("here", "found a folder")):
        wrong = fedmerge(tmp_path, "inspect", name)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert said in wrong.stderr
    (tmp_path / "page.pth").write_text("<html>")
    assert "a page of HTML" in fedmerge(tmp_path, "inspect", "page.pth").stderr


def test_a_model_by_its_name(tmp_path: Path) -> None:
    spec = ModelSpec.model_validate({"name": "resnet10t"})
    save_file(dict(build(spec, 4).state_dict()), tmp_path / "w.safetensors")
    said = fedmerge(tmp_path, "inspect", "w.safetensors", "--model", "resnet10t")
    assert said.returncode == 0, said.stderr
    assert "fits resnet10t with 4 classes" in said.stdout
    other = fedmerge(tmp_path, "inspect", "w.safetensors", "--model", "resnet18")
    assert other.returncode == 2
    assert "w.safetensors, as resnet18, does not fit the model" in other.stderr
    unknown = fedmerge(tmp_path, "inspect", "w.safetensors", "--model", "resnet10")
    assert unknown.returncode == 2
    assert "did you mean" in unknown.stderr


def test_tensors_of_eight_bits_and_sparse_ones(tmp_path: Path) -> None:
    save_file({"w.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "w.safetensors")
    said = fedmerge(tmp_path, "inspect", "w.safetensors")
    assert "1 tensors of 4 numbers: 1 float8_e4m3fn" in said.stdout, said.stderr
    torch.save({"w": torch.eye(2).to_sparse()}, tmp_path / "w.pth")
    said = fedmerge(tmp_path, "inspect", "w.pth")
    assert (said.returncode, said.stdout) == (2, "")
    assert "inspect: w.pth: found w as a sparse tensor" in said.stderr


def test_a_head_without_outputs(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.ones(0, 2), "fc.bias": torch.ones(0)}, tmp_path / "w.safetensors")
    said = fedmerge(tmp_path, "inspect", "w.safetensors", "--model", "resnet10t")
    assert said.returncode == 2
    assert "w.safetensors: fc: found a head of 0 outputs; expected one for each class, as resnet10t has" in said.stderr
    assert "head=" not in said.stderr


def test_a_name_that_is_not_utf_8_and_a_home_of_nobody(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    odd = tmp_path / "w\udcff.safetensors"
    odd.write_bytes((tmp_path / "w.safetensors").read_bytes())
    assert "1 tensors of 2 numbers" in "\n".join(told_of(odd, None, None))
    said = fedmerge(tmp_path, "inspect", "~nobody-of-that-name/x.pth")
    assert (said.returncode, "found nothing that can be opened" in said.stderr) == (2, True)
