"""A coordinator knows outlines of the hospitals' site files: enough for the same fingerprint, and no path of anybody's disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from fedmerge.cli.site_files import site_outline
from fedmerge.data.datasets._base import Geometry
from fedmerge.data.datasets.organ_phantom import ORGANS
from fedmerge.errors import DataError, ScenarioError, SiteError
from fedmerge.federated.flower.node_identity import OwnFile
from fedmerge.federated.messages import SiteTask, Training
from fedmerge.federated.model import ModelSpec
from fedmerge.federated.pool.experts import fingerprint
from fedmerge.federated.site import Site
from fedmerge.system.yaml_loader import check, read_yaml
from tests.conftest import TINY

Hospital = Callable[..., Path]


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    """A site file whose images are in a folder of the hospital's."""

    def make(**other: Any) -> Path:
        for organ in ORGANS:
            place = tmp_path / "disk" / "ward" / organ
            place.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), 50).save(place / "patient.png")
        source = {"kind": "image_folder", "root": str(tmp_path / "disk"), "flips": True}
        content = {"name": "ward", "source": source, "scanner": {"noise": 0.1}, "shifts": ["jpeg"], "samples": 2, "validation": 0.3}
        file = tmp_path / "ward.yaml"
        file.write_text(yaml.safe_dump(content | other))
        return file

    return make


def task(site: Site, seed: int = 5) -> SiteTask:
    model, training = ModelSpec.model_validate(TINY), Training(runs=1)
    return SiteTask(site=site, model=model, training=training, classes=ORGANS, seed=seed, initial_sha256="0" * 64, head_init="zero")


def known(file: Path, seed: int = 5) -> Site:
    return Site.model_validate(yaml.safe_load(site_outline(file, seed)))


def said(asked: SiteTask) -> dict[str, str]:
    return {"task": json.dumps(asked.model_dump(mode="json"))}


@pytest.mark.parametrize("source", [None, {"kind": "organ_phantom", "images": 60, "patients": 12}])
def test_an_outline_has_the_fingerprint_and_no_path(source: dict[str, Any] | None, hospital: Hospital, tmp_path: Path) -> None:
    file = hospital(**({"source": source} if source else {}))
    own, there = check(Site, read_yaml(file), str(file)), known(file)
    assert fingerprint(task(own)) == fingerprint(task(there))
    assert str(tmp_path) not in site_outline(file, 5)
    assert own.source.classes() == there.source.classes()
    assert there.source.flips == own.source.flips
    with pytest.raises(DataError, match="only the hospital itself can train"):
        there.source.load(Geometry(16, 1), "ward", 5)


def test_a_hospital_trains_on_its_own_site_file(hospital: Hospital) -> None:
    file = hospital()
    found = OwnFile().task(said(task(known(file))), {"site": str(file)})
    assert found == task(check(Site, read_yaml(file), str(file)))


@pytest.mark.parametrize(
    ("other", "named"),
    [({"scanner": {"noise": 0.2}}, "scanner"), ({"samples": 0}, "samples"), ({"validation": 0.1}, "validation"), ({}, "images")],
)
def test_two_files_that_mean_other_experts_are_refused(
    other: dict[str, Any], named: str, hospital: Hospital, tmp_path: Path
) -> None:
    asked = task(known(hospital()))
    file = hospital(**other)
    if not other:
        Image.new("L", (16, 16)).save(tmp_path / "disk" / "ward" / ORGANS[0] / "new.png")
    with pytest.raises(SiteError, match=f"differ in: {named};") as caught:
        OwnFile().task(said(asked), {"site": str(file)})
    assert str(tmp_path) not in caught.value.told


def test_a_node_plays_only_what_it_may(hospital: Hospital, tmp_path: Path) -> None:
    """Without a site file only a simulated node plays whom it is told to; a file that cannot be read is told without its path."""
    site = known(hospital())
    asked = {**said(task(site)), "site": json.dumps(site.model_dump(mode="json"))}
    assert OwnFile().site(asked, {"partition-id": 0}) == site
    assert OwnFile().task(asked, {"partition-id": 0}) == task(site)
    for call in (OwnFile().site, OwnFile().task):
        with pytest.raises(SiteError, match="does not say which hospital"):
            call(asked, {})
    node = {"site": str(tmp_path / "none.yaml")}
    with pytest.raises(SiteError) as caught:
        OwnFile().site(asked, node)
    assert (str(tmp_path) in caught.value.told, OwnFile().name(node)) == (False, "none")


def test_of_a_brought_expert_its_digest_and_no_path(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"weights")
    expert = {"checkpoint": str(tmp_path / "w.pth"), "classes": ["a", None]}
    file = tmp_path / "north.yaml"
    file.write_text(yaml.safe_dump({"name": "north", "source": {"kind": "organ_phantom"}, "expert": expert}))
    told = yaml.safe_load(site_outline(file, 0))
    assert told["expert"] == {"sha256": hashlib.sha256(b"weights").hexdigest(), "classes": ["a", None]}
    assert str(tmp_path) not in yaml.safe_dump(told)
    assert Site.model_validate(told).expert.digest == Site.model_validate(yaml.safe_load(file.read_text())).expert.digest
    (tmp_path / "w.pth").unlink()
    with pytest.raises(ScenarioError, match=r"north\.yaml, line \d+: expert\.checkpoint: found .*expected a file that can be read"):
        site_outline(file, 0)
