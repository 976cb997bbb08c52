"""A model that cannot take the images is told before anything is computed, with the key that has to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmerge.errors import ScenarioError
from fedmerge.federated.model import ModelSpec, try_out
from tests.conftest import TINY
from tests.front_door import SCENARIO, fedmerge, world

SMALL = {"depth": 1, "embed_dim": 12, "num_heads": 3}


def spec(kwargs: dict[str, Any], size: int | None = None, name: str = "vit_tiny_patch16_224") -> ModelSpec:
    return ModelSpec.model_validate({"name": name, "size": size, "kwargs": kwargs})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (spec(SMALL, 32), "model.size: found 32 (Input height (32) doesn't match model (224)); expected a size"),
        (spec({"img_size": 32, "patch_size": 64, **SMALL}), "model.kwargs.img_size: found 32 (Calculated padded input size"),
        (spec({"global_pool": ""}, 32, "resnet18"), "model.size: found 32 (mat1 and mat2"),
        (spec({"img_size": 32, "num_heads": 5}), "(dim should be divisible by num_heads); expected arguments that vit_tiny"),
        (spec({"img_size": 32, "num_heads": "a"}), "expected arguments that vit_tiny"),
        (spec({"init_values": "1e-5"}), "expected a number. Write 1.0e-05: YAML takes 1e-5 for text"),
        (spec({"num_heads": "03"}), "model.kwargs.num_heads: found the text '03' ("),
        (spec({"img_size": 32, "num_classes": 4}), "model.kwargs.num_classes: found 4; expected no such key: the sites' classes"),
        (
            spec({"pretrained": True}),
            "model.kwargs.pretrained: found True; expected no such key: initialization: {kind: pretrained}",
        ),
        (spec({"checkpoint_path": "w.pth"}), "model.kwargs.checkpoint_path: found w.pth; expected no such key"),
        (spec({"fine": 4}), "model.kwargs.fine: found 4 (VisionTransformer.__init__() got an unexpected keyword argument 'fine')"),
        (
            spec({}, name="resnet18.a4_in1k"),
            "model.name: found 'resnet18.a4_in1k'; expected weights that timm has of resnet18; did",
        ),
        (spec({}, name="Resnet18"), "model.name: found 'Resnet18'; expected a model of timm; did you mean 'resnet18'?"),
        (spec({"img_size": 32}, name="resnet18"), "model.kwargs.img_size: found 32 (ResNet.__init__() got an"),
        (spec({}, 32, "inception_v3"), "model.size: found 32 (Calculated padded input size"),
    ],
)
def test_what_a_model_does_not_take(given: ModelSpec, said: str) -> None:
    with pytest.raises(ScenarioError) as error:
        try_out(given, 3)
    assert said in str(error.value)
    assert len(error.value.problems) == 1


def test_pixels_that_no_patch_covers_are_told() -> None:
    assert try_out(spec({"img_size": 32, "patch_size": 7, **SMALL}), 3) == [
        "model: the last 4 of 32 rows or columns are not seen: its patches or strides do not divide 32"
    ]
    assert try_out(spec({"img_size": 32, "patch_size": [8, 7], **SMALL}), 3) == try_out(
        spec({"img_size": 32, "patch_size": 7, **SMALL}), 3
    )
    assert try_out(spec({"img_size": 32, "patch_size": 8, **SMALL}), 3) == []


@pytest.mark.parametrize(("name", "side", "rows"), [("resnet10t", 33, 0), ("convnext_atto", 33, 1), ("convnext_atto", 32, 0)])
def test_strides_leave_pixels_out_too(name: str, side: int, rows: int) -> None:
    said = [f"model: the last {rows} of {side} rows or columns are not seen: its patches or strides do not divide {side}"]
    assert try_out(spec({}, side, name), 3) == (said if rows else [])


def test_two_equal_sides_are_one() -> None:
    assert spec({"img_size": [32, 32]}) == spec({"img_size": 32})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"img_size": "abc"}, "model.kwargs.img_size: found 'abc'; expected a valid integer"),
        ({"img_size": 0}, "model.kwargs.img_size: found 0; expected greater than or equal to 8"),
        ({"img_size": [16, 32]}, "model.kwargs.img_size: found [16, 32]: expected one number, as images are squares"),
        ({"depth": 0}, "model.kwargs.depth: found 0: expected at least 1"),
        ({"depth": 3000}, "model.kwargs.depth: found 3000: expected at most 200"),
        ({"in_chans": 4}, "model.kwargs.in_chans: found 4; expected 1 or 3"),
        ({"in_chans": 2}, "model.kwargs.in_chans: found 2; expected 1 or 3"),
        ({"num_heads": 3}, "dim should be divisible by num_heads"),
        ({"nope": 3}, "scenarios/tiny.yaml, line {line}: model.kwargs.nope: found 3 (VisionTransformer.__init__() got"),
    ],
)
@pytest.mark.parametrize("verb", ["simulate", "plan"])
def test_every_verb_says_it_at_once(tmp_path: Path, verb: str, change: dict[str, Any], said: str) -> None:
    model = {**TINY, "kwargs": {**TINY["kwargs"], **change}}  # type: ignore[dict-item]
    text = yaml.safe_dump({**SCENARIO, "model": model})
    world(tmp_path).write_text(text)
    said = said.replace("{line}", str(1 + text[: text.find("nope")].count("\n")))
    ended = fedmerge(tmp_path, verb, "scenarios/tiny.yaml")
    assert ended.returncode == 2
    assert said in ended.stderr
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_no_number_is_infinite(tmp_path: Path, value: str) -> None:
    world(tmp_path)
    keys = ["training.diversity.lr.default", "initialization.lr", "target_deadline_s"]
    for key in keys:
        ended = fedmerge(tmp_path, "simulate", "scenarios/tiny.yaml", "--set", f"{key}=.{value}".replace("=.-", "=-."))
        assert ended.returncode == 2
        assert f"found {value}; expected" in ended.stderr
