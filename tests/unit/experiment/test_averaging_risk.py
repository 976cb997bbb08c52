"""What the weights in a pool tell, in numbers and in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedmerge.errors import FolderError
from fedmerge.experiment.averaging_risk import as_json, federations, risk, risk_words
from fedmerge.federated.messages import Initial, Job, SiteTask
from fedmerge.federated.pool.experts import ExpertPool
from fedmerge.federated.server.in_process import LocalBackend
from fedmerge.federated.server.initialization import keep_theta_0, kept_theta_0
from tests.hospitals import hospital, initial, job  # noqa: F401 - fixtures


def test_a_pool_is_told_in_words(hospital: Callable[..., SiteTask], job: Callable[..., Job]) -> None:  # noqa: F811
    asked = job(hospital("north"), hospital("south"), hospital("east", runs=1))
    LocalBackend().gather(asked, lambda _: None)
    (found,) = federations(asked.pool)
    assert found.relative is None
    assert "not in the pool" in risk_words(found)[0]
    keep_theta_0(asked.initial, asked.pool)
    (found,) = federations(asked.pool)
    assert found.relative is not None
    assert set(found.names) == {"north", "south", "east"}
    assert "Risk of averaging" in risk_words(found)[0]
    assert found.raw.blocks[-1] == "head"
    told = as_json([found])
    assert json.loads(json.dumps(told))[0]["learned"]["agreement"] == found.relative.agreement.tolist()
    weights = [ExpertPool(asked.pool).load(task).weights["head.weight"].double() for task in found.tasks]
    moved = torch.stack([w.flatten() for w in weights]) - asked.initial.weights["head.weight"].double().flatten()
    cosine = torch.nn.functional.cosine_similarity(moved[0], moved[1], dim=0)
    angle = found.relative.angles[-1, 0, 1]
    assert float(torch.rad2deg(torch.arccos(cosine))) == pytest.approx(
        float(angle), abs=1.5
    )  # the head's bias is in the block, too


def test_theta_0_is_kept_whole_or_not_at_all(initial: Initial, tmp_path: Path) -> None:  # noqa: F811
    assert kept_theta_0(initial.sha256, tmp_path) is None
    keep_theta_0(initial, tmp_path)
    again = kept_theta_0(initial.sha256, tmp_path)
    assert again is not None
    assert all(torch.equal(again[name], tensor) for name, tensor in initial.weights.items())
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    assert kept_theta_0(initial.sha256, tmp_path) is None


def test_a_pool_without_a_federation_says_so(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="found 0 experts"):
        federations(tmp_path)
    (tmp_path / "experts" / "north-1").mkdir(parents=True)
    for content in ("{}", "[]", "null", '{"task": 7}', ""):
        (tmp_path / "experts" / "north-1" / "manifest.json").write_text(content)
        with pytest.raises(FolderError, match="north-1: found one that cannot be read"):
            federations(tmp_path)


def test_the_words_follow_the_agreement() -> None:
    assert [risk(a) for a in (0.9, 0.5, 0.3, 0.1, -2.0)] == ["low", "low", "some", "high", "high"]
