"""Images on which methods disagree leave a target by its own file's grant alone, and are audited."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedmerge.adaptation.target_site import TargetSite
from fedmerge.errors import SiteError
from tests.front_door import done, lines, read


def granting(first: tuple[Path, str], folder: Path, images: int) -> Path:
    """A world with a pool, whose target shows so many."""
    here = Path(shutil.copytree(first[0], folder / "here"))
    file = here / "sites" / "mercy.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "disagreements": images}))
    return here


def test_by_default_none_is_asked_for(first: tuple[Path, str]) -> None:
    run = first[0] / "runs" / "tiny-3"
    assert read(run / "manifest.json")["shown"] == {"samples": 1, "disagreements": 0}
    assert not [line for line in lines(run) if '"disagreements"' in line]
    assert "disagreements" not in (run / "scenario.yaml").read_text()
    assert "The target shows none of them" in (run / "report.html").read_text()


def test_granted_ones_are_shown_and_audited(first: tuple[Path, str], tmp_path: Path) -> None:
    here = granting(first, tmp_path, 3)
    done(here, "--out", "runs/shown")
    run = here / "runs" / "shown"
    (item,) = [json.loads(line) for line in lines(run) if json.loads(line)["item"] == "disagreements"]
    shown = read(run / "manifest.json")["shown"]
    assert 0 < shown["disagreements"] == item["shape"][0] <= 3
    assert (item["site"], item["kind"], item["dtype"], item["verdict"]) == ("mercy", "samples", "uint8", "admitted")
    assert item["bytes"] == np.prod(item["shape"])
    page = (run / "report.html").read_text()
    assert page.count('<li><img alt="image ') == shown["disagreements"]
    assert "<strong>mercy</strong>: " in page  # what left it


def test_the_target_itself_refuses_more_than_its_file_grants(
    monkeypatch: pytest.MonkeyPatch, first: tuple[Path, str], tmp_path: Path
) -> None:
    """In one question or in several; the same images again are no new ones."""
    here = granting(first, tmp_path, 3)
    asked = TargetSite.disputed
    found: list[str] = []

    def greedy(site: TargetSite, places: list[int]) -> np.ndarray:
        images = asked(site, places)
        np.testing.assert_array_equal(asked(site, places), images)
        others = [place for place in range(site.stream.samples) if place not in places]
        for more in (others[: 4 - len(places)], others):
            with pytest.raises(SiteError, match=r"target 'mercy': disagreements: found \d+ images asked for; expected at most 3"):
                asked(site, more)
            found.append("refused")
        return images

    monkeypatch.setattr(TargetSite, "disputed", greedy)
    done(here, "--out", "runs/greedy")
    assert found == ["refused", "refused"]
