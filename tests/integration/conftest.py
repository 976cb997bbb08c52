"""Hospitals whose images give trouble."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fedmerge.federated.messages import SiteTask

Hospital = Callable[..., SiteTask]


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
