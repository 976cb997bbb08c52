"""One scenario by every backend: the same experts, the same audit, the same predictions, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.front_door import command, done, lines, read, same_predictions, without_times, world

pytestmark = pytest.mark.slow


def experts(pool: Path) -> dict[str, bytes]:
    """Of the two hospitals of the scenario: other tests may have let more into the pool."""
    found = {file.parent.name: file.read_bytes() for file in pool.glob("experts/*/expert.safetensors")}
    return {name: content for name, content in found.items() if name.startswith(("north-", "south-"))}


def audited(run: Path) -> list[str]:
    """Lines of the audit without their times, in an order of their own: hospitals answer as they get ready."""
    entries = [json.loads(line) for line in lines(run)]
    return sorted(json.dumps({key: value for key, value in entry.items() if key != "time"}) for entry in entries)


def same(folder: Path, other: Path) -> None:
    run, there = folder / "runs" / "tiny-3", other / "runs" / "tiny-3"
    assert experts(folder / "pool") == experts(other / "pool")
    assert len(experts(folder / "pool")) == 2
    assert same_predictions(run, there)
    assert audited(run) == audited(there)
    assert without_times(read(run / "summary.json")) == without_times(read(there / "summary.json"))


def test_simulation_gives_the_bits_of_local(first: tuple[Path, str], tmp_path: Path) -> None:
    world(tmp_path / "there")
    said = done(tmp_path / "there", "--backend", "simulation", by=command)
    assert "hospitals: north, south train" in said
    same(first[0], tmp_path / "there")
    manifest = read(tmp_path / "there" / "runs" / "tiny-3" / "manifest.json")
    assert manifest["backend"] == "simulation"


def test_worker_processes_give_the_bits_of_one(first: tuple[Path, str], tmp_path: Path) -> None:
    world(tmp_path / "there")
    done(tmp_path / "there", "--jobs", "2")
    same(first[0], tmp_path / "there")
