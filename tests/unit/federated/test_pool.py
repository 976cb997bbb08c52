"""The pool: what is there is what was uploaded, and nothing that determines an expert can change unnoticed."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedmerge.data.scanner import Scanner
from fedmerge.errors import FolderError
from fedmerge.federated.messages import Job, Reply, SiteTask
from fedmerge.federated.pool import tensor_file
from fedmerge.federated.pool.experts import ExpertPool, fingerprint
from fedmerge.federated.security.audit import RUN_SCALARS, Upload, inspect, state_digest
from fedmerge.federated.server.collect import declaration


@pytest.fixture
def kept(hospital: Callable[..., SiteTask], job: Callable[..., Job]) -> tuple[ExpertPool, SiteTask, Upload]:
    """A pool with one upload that nobody had to train."""
    task = hospital("north", samples=2, runs=1)
    asked = job(task)
    scalars = {"n": 48.0, "validation_accuracy": 0.75, "temperature": 1.5, **{f"runs.0.{name}": 0.25 for name in RUN_SCALARS}}
    upload = Upload("north", asked.initial.weights, scalars, torch.zeros(2, 16, 16, 1, dtype=torch.uint8))
    pool = ExpertPool(asked.pool)
    assert not pool.has(task)
    pool.add(task, upload, inspect(upload, declaration(task, asked.initial.weights)), Reply(task, upload, "", 2.0).seconds)
    return pool, task, upload


def test_what_comes_out_is_what_went_in(kept: tuple[ExpertPool, SiteTask, Upload]) -> None:
    pool, task, upload = kept
    expert = pool.load(task)
    assert pool.has(task)
    assert all(torch.equal(expert.weights[name], tensor) for name, tensor in upload.weights.items())
    assert (expert.n, expert.validation_accuracy, expert.temperature) == (48, 0.75, 1.5)
    assert expert.runs == [dict.fromkeys(RUN_SCALARS, 0.25)]
    assert expert.sha256 == state_digest(upload.weights)
    assert expert.samples is not None
    assert {item["item"] for item in expert.audit} == {*upload.weights, *upload.scalars, "samples"}


def test_adding_twice_keeps_the_first(kept: tuple[ExpertPool, SiteTask, Upload]) -> None:
    pool, task, upload = kept
    other = {name: tensor + 1 for name, tensor in upload.weights.items()}
    pool.add(task, Upload("north", other, upload.scalars), [], 0)
    assert pool.load(task).sha256 == state_digest(upload.weights)
    assert len(list((pool.path / "experts").iterdir())) == 1


def test_a_site_that_trains_again_replaces_what_is_left_of_its_entry(kept: tuple[ExpertPool, SiteTask, Upload]) -> None:
    pool, task, upload = kept
    entry = pool.entry(task)
    audit = inspect(upload, declaration(task, upload.weights))
    (entry / "manifest.json").unlink()
    pool.add(task, upload, audit, 0)
    assert pool.load(task).sha256 == state_digest(upload.weights)
    shutil.rmtree(entry)
    entry.write_text("a file in its place")
    pool.add(task, upload, audit, 0)
    assert pool.load(task).sha256 == state_digest(upload.weights)


def test_damage_is_noticed_and_says_how_to_mend_it(kept: tuple[ExpertPool, SiteTask, Upload]) -> None:
    pool, task, _ = kept
    (entry,) = (pool.path / "experts").iterdir()
    whole = (entry / "expert.safetensors").read_bytes()
    for damaged in (whole[:-4], whole[:-4] + b"\x00\x00\x80\x3f", b""):
        (entry / "expert.safetensors").write_bytes(damaged)
        with pytest.raises(FolderError, match="Delete it, and the site trains again"):
            pool.load(task)
    (entry / "expert.safetensors").write_bytes(whole)
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "0" * 64}))
    with pytest.raises(FolderError, match="fingerprint"):
        pool.load(task)


def test_a_flipped_byte_in_any_file_is_noticed(kept: tuple[ExpertPool, SiteTask, Upload]) -> None:
    """Of the expert, the sample images and the manifest, wherever it is; and a file that is gone is noticed, too."""
    pool, task, _ = kept
    files = [path for path in pool.entry(task).iterdir() if path.is_file()]
    assert {file.name for file in files} == {"expert.safetensors", "samples.safetensors", "manifest.json"}
    for file in files:
        whole = file.read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // 97)):
            file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            with pytest.raises(FolderError, match="Delete it, and the site trains again"):
                pool.load(task)
        file.write_bytes(whole)
        assert pool.load(task)
    (pool.entry(task) / "samples.safetensors").unlink()
    with pytest.raises(FolderError, match="samples"):
        pool.load(task)


@pytest.mark.parametrize("lacking", [["statement", "signature", "manifest_sha256"], ["manifest_sha256"], ["statement"]])
def test_a_manifest_that_lacks_something_cannot_be_read(lacking: list[str], kept: tuple[ExpertPool, SiteTask, Upload]) -> None:
    pool, task, _ = kept
    file = pool.entry(task) / "manifest.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in whole.items() if name not in lacking}))
    with pytest.raises(FolderError, match="Delete it, and the site trains again"):
        pool.load(task)


def test_an_unsigned_entry_stays_good_when_its_site_gets_a_key(kept: tuple[ExpertPool, SiteTask, Upload]) -> None:
    pool, task, upload = kept
    key = base64.b64encode(bytes(32)).decode()
    signs = task.model_copy(update={"site": task.site.model_copy(update={"public_key": key})})
    for asked in (task, signs):
        expert = pool.load(asked)
        assert expert.sha256 == state_digest(upload.weights)
        assert not expert.signed


@pytest.mark.parametrize("words", [{}, {"audit": "[]"}])
def test_arrays_without_their_digest_cannot_be_read(words: dict[str, str], tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / "file.safetensors", words)
    with pytest.raises(FolderError, match=r"its digest differs\); expected a whole one\. Delete it"):
        tensor_file.take(tmp_path / "file.safetensors", "delete it")


CHANGES: dict[str, Callable[[SiteTask], SiteTask]] = {
    "seed": lambda t: t.model_copy(update={"seed": 1}),
    "initialization": lambda t: t.model_copy(update={"initial_sha256": "0" * 64}),
    "head": lambda t: t.model_copy(update={"head_init": "zero"}),
    "epochs": lambda t: t.model_copy(update={"training": t.training.model_copy(update={"epochs": 3})}),
    "threads": lambda t: t.model_copy(update={"training": t.training.model_copy(update={"threads": 2})}),
    "precision": lambda t: t.model_copy(update={"training": t.training.model_copy(update={"precision": "bfloat16"})}),
    "layout": lambda t: t.model_copy(update={"training": t.training.model_copy(update={"precision": "float32_channels_last"})}),
    "scanner": lambda t: t.model_copy(update={"site": t.site.model_copy(update={"scanner": Scanner(noise=0.3)})}),
    "name": lambda t: t.model_copy(update={"site": t.site.model_copy(update={"name": "south"})}),
    "validation": lambda t: t.model_copy(update={"site": t.site.model_copy(update={"validation": 0.3})}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_determines_an_expert_is_in_its_fingerprint(what: str, hospital: Callable[..., SiteTask]) -> None:
    task = hospital("north")
    assert fingerprint(CHANGES[what](task)) != fingerprint(task)


def test_what_does_not_matter_is_not(hospital: Callable[..., SiteTask]) -> None:
    task = hospital("north")
    waits = task.model_copy(update={"training": task.training.model_copy(update={"deadline_s": 5.0})})
    titled = task.model_copy(update={"site": task.site.model_copy(update={"title": "St. North"})})
    assert fingerprint(waits) == fingerprint(titled) == fingerprint(task)
