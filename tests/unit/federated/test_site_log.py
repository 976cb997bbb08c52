"""What a hospital tells of what went wrong: no name of a file, no path, no text that nobody foresaw; its own log has all of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmerge.errors import DataError
from fedmerge.federated.client import worker
from fedmerge.federated.client.site_log import kept_privately, own_log, tell_site_log, where
from fedmerge.federated.messages import Request, SiteTask, Tick

SECRET = "patient-0815"


def ask(task: SiteTask) -> str:
    reply = worker.answer(Request("train", task, {}), lambda _: None)
    assert reply.upload is None
    return reply.reason


@pytest.fixture
def torn(tmp_path: Path, hospital: Callable[..., SiteTask]) -> dict[str, Any]:
    """An image folder whose files are no images."""
    for organ in hospital("x").classes:
        (tmp_path / "images" / "ward" / organ).mkdir(parents=True)
        (tmp_path / "images" / "ward" / organ / f"{SECRET}.png").write_text("no image")
    return {"kind": "image_folder", "root": str(tmp_path / "images"), "max_broken": 2}


def test_images_that_cannot_be_used(hospital: Callable[..., SiteTask], torn: dict[str, Any], tmp_path: Path) -> None:
    reason = ask(hospital("torn", torn))
    assert reason.startswith("source.max_broken: found more than 2 files that are no image; expected at most as many")
    for secret in (SECRET, str(tmp_path), "liver", "11"):
        assert secret not in reason
    kept_there = own_log("torn").read_text()
    assert f"ward/bladder/{SECRET}.png" in kept_there
    assert "Traceback" in kept_there


def test_what_nobody_foresaw(hospital: Callable[..., SiteTask], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyError(f"{SECRET} has no label")

    monkeypatch.setattr(worker, "train_site", fails)
    reason = ask(hospital("odd"))
    assert reason.startswith("it failed with KeyError in worker.py, line ")
    assert SECRET not in reason
    assert f"{SECRET} has no label" in own_log("odd").read_text()


def test_only_what_an_error_says_may_be_told() -> None:
    assert tell_site_log("x", DataError(f"cannot read {SECRET}")) == "its images cannot be used"
    assert tell_site_log("x", DataError(f"cannot read {SECRET}", "source.root: cannot be used")) == "source.root: cannot be used"
    assert tell_site_log("x", ValueError(SECRET)) == "it failed with ValueError"


def test_warnings_stay_in_the_sites_own_log(capfd: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("fedmerge.data.datasets.image_folder")
    with kept_privately("warned"):
        log.warning("left out %s", SECRET)
    assert SECRET in own_log("warned").read_text()
    assert SECRET not in "".join(capfd.readouterr())
    assert where("warned", 0) == f" (in full, at the site: {own_log('warned')})"
    assert where("warned", 1e12) == where("silent", 0) == ""


def test_progress_tells_no_number_of_images(hospital: Callable[..., SiteTask]) -> None:
    ticks: list[Tick] = []
    task = hospital("north", runs=1, epochs=1)
    from fedmerge.federated.client.site_training import model_of

    worker.answer(Request("train", task, dict(model_of(task).state_dict())), ticks.append)
    assert {tick.total for tick in ticks} == {100}
    assert ticks[-1].done == 100
