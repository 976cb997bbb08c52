"""The audit: exactly what was declared leaves a site, and every byte of it is on record."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmerge.errors import UploadRefused
from fedmerge.federated.security.audit import Declaration, Upload, digest, inspect, state_digest, write_audit

STATE = {
    "encoder.weight": torch.arange(6.0).reshape(2, 3),
    "norm.running_var": torch.ones(2),
    "steps": torch.tensor(3),
    "head.bias": torch.zeros(2),
}
SCALARS = {"n": 40.0, "validation_accuracy": 0.5, "temperature": 1.2} | {
    f"runs.0.{name}": 0.1 for name in ("lr", "weight_decay", "dropout", "validation_accuracy")
}
DECLARED = Declaration.of("north", STATE, runs=1, samples=2, image_shape=(4, 4, 1))
SHOWN = torch.zeros(2, 4, 4, 1, dtype=torch.uint8)
GOOD = Upload("north", STATE, SCALARS, SHOWN)


def test_every_byte_is_on_record() -> None:
    items = {item.item: item for item in inspect(GOOD, DECLARED)}
    assert set(items) == {*STATE, *SCALARS, "samples"}
    assert items["encoder.weight"].bytes == 6 * 4
    assert items["steps"].bytes == 8
    assert items["n"].bytes == 8
    assert items["samples"].bytes == 32
    assert items["encoder.weight"].sha256 == hashlib.sha256(STATE["encoder.weight"].numpy().tobytes()).hexdigest()
    assert {item.verdict for item in items.values()} == {"admitted"}


BAD = {
    "an extra array": (replace(GOOD, weights={**STATE, "patients": torch.zeros(9)}), r"undeclared \['patients'\]"),
    "a missing array": (replace(GOOD, weights={"steps": STATE["steps"]}), "missing"),
    "a wrong shape": (replace(GOOD, weights={**STATE, "head.bias": torch.zeros(3)}), r"shape of head.bias: found \(3,\)"),
    "a wrong dtype": (replace(GOOD, weights={**STATE, "head.bias": torch.zeros(2).double()}), "dtype of head.bias"),
    "a negative variance": (
        replace(GOOD, weights={**STATE, "norm.running_var": torch.tensor([1.0, -0.1])}),
        "norm.running_var: found a negative variance; expected 0 or more",
    ),
    "a NaN": (replace(GOOD, weights={**STATE, "head.bias": torch.tensor([0.0, torch.nan])}), "head.bias: found NaN"),
    "an infinity": (replace(GOOD, weights={**STATE, "head.bias": torch.tensor([0.0, torch.inf])}), "infinity"),
    "an image as an array": (replace(GOOD, weights={**STATE, "image": SHOWN[0]}), "undeclared"),
    "an image in place of an array": (replace(GOOD, weights={**STATE, "head.bias": SHOWN[0]}), "shape of head.bias"),
    "an extra number": (replace(GOOD, scalars={**SCALARS, "age": 71.0}), r"scalars: found undeclared \['age'\]"),
    "a number that is none": (replace(GOOD, scalars={**SCALARS, "n": float("nan")}), "scalar n: found nan"),
    "a text for a number": (replace(GOOD, scalars={**SCALARS, "n": "Mrs Smith"}), "finite number"),  # type: ignore[dict-item]
    "too many samples": (replace(GOOD, samples=torch.zeros(3, 4, 4, 1, dtype=torch.uint8)), "number of sample images"),
    "larger samples": (replace(GOOD, samples=torch.zeros(2, 8, 8, 1, dtype=torch.uint8)), "shape of samples"),
    "another site's name": (replace(GOOD, site="south"), "site: found south; expected north"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_was_not_declared_is_refused(what: str) -> None:
    upload, message = BAD[what]
    with pytest.raises(UploadRefused, match=message):
        inspect(upload, DECLARED)


def test_samples_need_a_grant() -> None:
    with pytest.raises(UploadRefused, match="number of sample images"):
        inspect(GOOD, Declaration.of("north", STATE, runs=1, samples=0, image_shape=(4, 4, 1)))


def test_the_digest_depends_on_names_shapes_and_bytes() -> None:
    same = {name: tensor.clone() for name, tensor in reversed(STATE.items())}
    assert state_digest(same) == state_digest(STATE)
    assert state_digest({**STATE, "head.bias": torch.tensor([0.0, 1e-30])}) != state_digest(STATE)
    assert state_digest({**STATE, "head.bias": torch.zeros(2, 1)}) != state_digest(STATE)
    assert digest(torch.arange(6.0).reshape(3, 2).T) == digest(torch.arange(6.0).reshape(3, 2).T.contiguous())
    assert digest(torch.empty(0)) == hashlib.sha256(b"").hexdigest()


def test_the_audit_grows_by_lines(tmp_path: Path) -> None:
    for _ in range(2):
        write_audit(tmp_path / "audit.jsonl", inspect(GOOD, DECLARED))
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * (len(STATE) + len(SCALARS) + 1)
    assert {"time", "site", "item", "bytes", "sha256", "shape", "dtype", "direction"} <= set(lines[0])
