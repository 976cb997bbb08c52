"""Names of folders: what looks the same is the same or refused, and what nobody can write is refused with its place."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedmerge.data.datasets.image_folder import ImageFolder
from fedmerge.data.datasets.remote import Remote


def album(root: Path, *folders: str, images: int = 1) -> Path:
    """Folders `domain/class` with images."""
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for image in range(images):
            Image.new("L", (8, 8), 10 * number + image).save(root / folder / f"{image}.png")
    return root


def problem(root: Path, **fields: Any) -> str:
    (found,) = ImageFolder(root=str(root), **fields).check()
    return str(found)


NFC = unicodedata.normalize("NFC", "n\u00e4vus")
NFD = unicodedata.normalize("NFD", "n\u00e4vus")


@pytest.mark.parametrize(
    ("name", "other", "words"),
    [
        ("mel", "Mel", ("lab/mel'", "ward/Mel'", "differ in case only")),
        ("mel", "mel ", ("differ in blanks only",)),
        ("basal cell", "basal  cell", ("differ in blanks only",)),
        ("basal cell", "basal\u00a0cell", ("differ in Unicode form only", "\\xa0")),
        ("mel", "\u200bmel", ("differ in blanks only", "\\u200b")),
        (NFC, NFD, ("differ in Unicode form only", "na\\u0308vus")),
        (NFC, NFD.title() + " ", ("differ in case, blanks or Unicode form only",)),
        ("gro\u00df", "GROSS", ("differ in case only",)),
    ],
)
def test_classes_that_look_the_same(name: str, other: str, words: tuple[str, ...], tmp_path: Path) -> None:
    root = album(tmp_path, f"lab/{name}", "lab/nev", f"ward/{other}", "ward/nev")
    for source in ({}, {"folders": ["lab"]}, {"folders": ["ward"]}):
        said = problem(root, **source)
        for word in (*words, "one name for one class", "Rename the folders"):
            assert word in said


def test_domains_that_look_the_same(tmp_path: Path) -> None:
    root = album(tmp_path, "lab/mel", "lab/nev", "Lab /mel", "Lab /nev", "ward/mel", "ward/nev")
    for source in ({}, {"folders": ["lab"]}):
        said = problem(root, **source)
        assert "lab'" in said
        assert "Lab '" in said
        assert "one name for one domain" in said
    assert ImageFolder(root=str(root), folders=["ward"]).check() == []
    assert "did you mean 'ward'?" in problem(root, folders=["WARD"])


def test_names_that_differ_are_left_alone(tmp_path: Path) -> None:
    root = album(tmp_path, "lab/grade 1", "lab/grade 11", "lab/grade-1", "lab/m\u00e4l", "lab/mal")
    assert ImageFolder(root=str(root)).check() == []


def test_an_outline_with_classes_that_look_the_same() -> None:
    (found,) = Remote(labels=["mel", "Mel"], parts=["lab"], sha256="0" * 64).check()
    assert "labels: found 'Mel' and 'mel', which differ in case only" in str(found)
