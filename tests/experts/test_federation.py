"""Real Flower and Ray: the federation gives what the plain loop gives, and one site's trouble costs no other its expert."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fedmerge.experts import federation, local
from fedmerge.experts.asking import Job, Tick
from fedmerge.experts.pool import ExpertPool
from fedmerge.experts.site_log import own_log
from fedmerge.experts.train import SiteTask

Hospital = Callable[..., SiteTask]
Jobs = Callable[..., Job]


def ray_processes() -> set[str]:
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in found.splitlines() if "raylet" in line or "gcs_server" in line or "ray::" in line}


def all_ended(before: set[str], within_s: float = 15) -> bool:
    """Ray's daemons notice that their owner is gone within seconds."""
    began = time.monotonic()
    while ray_processes() - before and time.monotonic() - began < within_s:
        time.sleep(0.2)
    return not ray_processes() - before


@pytest.fixture
def folder_of_text(tmp_path: Path, hospital: Hospital) -> dict[str, object]:
    """An image folder that looks right from outside: the files' names are those of images, their content is not."""
    for organ in hospital("x").classes:
        place = tmp_path / "images" / "ward" / organ
        place.mkdir(parents=True)
        for number in range(6):
            if organ == "liver":
                (place / f"{number}.png").write_text("no image")
            else:
                Image.new("L", (16, 16), number * 20).save(place / f"{number}.png")
    return {"kind": "image_folder", "root": str(tmp_path / "images"), "max_broken": 2}


@pytest.mark.slow
def test_flower_gives_the_same_experts_as_the_plain_loop(hospital: Hospital, job: Jobs) -> None:
    before = ray_processes()
    tasks = (hospital("north", samples=3), hospital("south"))
    here, there = job(*tasks, folder="local"), job(*tasks, folder="flower")
    ticks: list[Tick] = []
    local.gather(here, lambda _: None)
    outcomes = federation.gather(there, ticks.append)
    assert {name: outcome.trained for name, outcome in outcomes.items()} == {"north": True, "south": True}
    for task in tasks:
        a, b = ExpertPool(here.pool).load(task), ExpertPool(there.pool).load(task)
        assert (a.sha256, a.runs, a.temperature, a.n) == (b.sha256, b.runs, b.temperature, b.n)
    assert {tick.site for tick in ticks} == {"north", "south"}
    assert all_ended(before)
    audits = [[json.loads(line) for line in j.audit.read_text().splitlines()] for j in (here, there)]
    strip = [sorted((x["site"], x["item"], x["bytes"], x["sha256"]) for x in lines) for lines in audits]
    assert strip[0] == strip[1]
    again = federation.gather(there, ticks.append)
    assert not any(outcome.trained or outcome.reason for outcome in again.values())


@pytest.mark.slow
def test_a_site_that_fails_is_named_and_the_others_are_kept(
    hospital: Hospital, job: Jobs, folder_of_text: dict[str, object]
) -> None:
    good, bad = hospital("good"), hospital("bad", folder_of_text)
    asked = job(good, bad)
    outcomes = federation.gather(asked, lambda _: None)
    assert outcomes["good"].trained
    assert outcomes["bad"].reason.startswith("source.max_broken: found more than 2 files that are no image")
    assert "liver" not in outcomes["bad"].reason
    assert "ward/liver/0.png" in own_log("bad").read_text()
    assert "Traceback" not in outcomes["bad"].reason
    assert ExpertPool(asked.pool).has(good)
    assert not ExpertPool(asked.pool).has(bad)


@pytest.mark.slow
def test_a_site_that_never_answers_costs_its_deadline_and_no_more(hospital: Hospital, job: Jobs) -> None:
    before, began = ray_processes(), time.monotonic()
    quick, endless = hospital("quick"), hospital("endless", epochs=100_000, max_steps=10_000_000)
    asked = job(quick, endless, deadline_s=15)
    outcomes = federation.gather(asked, lambda _: None)
    assert outcomes["quick"].trained
    assert "did not answer within 15 s" in outcomes["endless"].reason
    assert time.monotonic() - began < 75
    assert ExpertPool(asked.pool).has(quick)
    assert all_ended(before)


@pytest.mark.slow
def test_linear_probing_by_flower_is_that_of_the_plain_loop(hospital: Hospital, job: Jobs) -> None:
    tasks = (hospital("north"), hospital("south"))
    here, there = local.probe(job(*tasks, folder="local"), lambda _: None), federation.probe(job(*tasks), lambda _: None)
    assert here.sha256 == there.sha256 != job(*tasks).initial.sha256
