"""Image folders by the front door: which images are which decides who trains, and what a run may go on from."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fedmerge.experiment.dry_run import in_pool, known_start
from fedmerge.experiment.experiment import load_experiment
from fedmerge.experiment.sweep import Cell
from fedmerge.experiment.sweep import _done as is_done
from tests.front_door import SCENARIO, done, fedmerge, read


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two hospitals and a target, a domain of one root each, with bitmaps, whose size does not tell what they show."""
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    (tmp_path / "scenarios").mkdir()
    (tmp_path / "sites").mkdir()
    for site in "abc":
        for shade, label in ((60, "cat"), (180, "dog")):
            (tmp_path / "data" / site / label).mkdir(parents=True)
            for number in range(8):
                pixels = (shade + rng.integers(-40, 40, (16, 16))).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / site / label / f"P{number % 3}_{number}.bmp")
        source = {"kind": "image_folder", "root": str(tmp_path / "data"), "folders": [site]}
        (tmp_path / "sites" / f"{site}.yaml").write_text(yaml.safe_dump({"name": site, "source": source}))
    short = {"training": {**SCENARIO["training"], "runs": 1}, "methods": ["mean", "expert"]}
    scenario = {**SCENARIO, **short, "sites": ["a", "b"], "target": "c", "stream": {"kind": "iid", "batch_size": 8}}
    (tmp_path / "scenarios" / "tiny.yaml").write_text(yaml.safe_dump(scenario))
    return tmp_path


def replace(folder: Path) -> None:
    """Every image by its negative, with the same name, size and time of its last change."""
    for file in sorted(folder.rglob("*.bmp")):
        before = file.stat()
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size


def experts(pool: Path) -> set[tuple[str, str]]:
    """Site and digest of every expert in a pool."""
    return {(told["site"], told["sha256"]) for told in map(read, pool.glob("experts/*/manifest.json"))}


def test_a_hospital_whose_images_are_replaced_trains_again(folders: Path) -> None:
    done(folders, "--out", "first")
    whole, pool, cell = load_experiment(folders / "scenarios" / "tiny.yaml"), folders / "pool", Cell(0, (), None)
    assert is_done(cell, folders / "first", whole)
    assert in_pool(whole, pool, known_start(whole, pool), set()) == {"a": True, "b": True}
    replace(folders / "data" / "a")
    assert not is_done(cell, folders / "first", whole)
    assert in_pool(whole, pool, known_start(whole, pool), set()) == {"a": False, "b": True}
    old = experts(pool)
    done(folders, "--out", "second", "--experts-only")
    done(folders, "--out", "fresh", "--experts-only", "--pool", "fresh_pool")
    assert read(folders / "second" / "manifest.json")["trained"] == {"a": True, "b": False}
    assert experts(folders / "fresh_pool") < experts(pool)
    assert [site for site, _ in experts(pool) - old] == ["a"]


def test_what_looks_back_on_a_run_takes_its_own_experts_and_images(folders: Path) -> None:
    done(folders, "--out", "first")
    replace(folders / "data" / "a")
    assert fedmerge(folders, "diagnose", "first").returncode == 0
    assert fedmerge(folders, "mirage", "pool").returncode == 0
    replace(folders / "data" / "c")
    said = fedmerge(folders, "diagnose", "first").stderr
    assert "other images of the target 'c'" in said
    assert "--predictions-only" in said
