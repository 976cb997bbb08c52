"""Names of folders: what looks the same is the same or refused, and what nobody can write is refused with its place."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedmerge.data.datasets._base import Geometry
from fedmerge.data.datasets.image_folder import ImageFolder
from fedmerge.data.datasets.remote import Remote
from fedmerge.errors import DataError


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


def latin(path: Path) -> Path:
    """The same path, with a last name that no text in UTF-8 can hold."""
    return path.with_name(os.fsdecode(b"n\xe4vus"))


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """Of classes and domains: they would be written into reports. Files and folders below a class are nobody's concern."""
    root = album(tmp_path / "root", "lab/mel", "lab/nev", "ward/mel")
    nev, ward = root / "lab" / "nev", root / "ward"
    odd = nev.rename(latin(nev))
    assert "lab/n\\xe4vus'; expected folders with names in UTF-8" in problem(root)
    assert "Rename it" in problem(root, folders=["ward"])
    odd.rename(nev)
    (nev / "0.png").rename(latin(nev / "0.png"))
    source = ImageFolder(root=str(root), folders=["lab"])
    assert source.check() == []
    assert len(source.load(Geometry(8, 1), "x", 0)) == 2
    assert source.identity("x", 0)
    ward.rename(latin(ward))
    assert source.check() == []
    assert "n\\xe4vus'" in problem(root)


LEFT_BEHIND = (
    "__MACOSX",
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    "__pycache__",
    ".ipynb_checkpoints",
)
FILES_LEFT_BEHIND = ("Thumbs.db", "THUMBS.DB", "desktop.ini", "Desktop.ini", "ehthumbs.db", ".DS_Store", "._0.png", "Icon\r")


def test_what_operating_systems_leave_behind_is_passed_over(tmp_path: Path) -> None:
    root = album(tmp_path / "root", "lab/mel", "lab/nev/patient")
    before = ImageFolder(root=str(root)).identity("x", 0)
    for name in LEFT_BEHIND:
        for place in (root, root / "lab", root / "lab" / "mel", root / "lab" / "nev" / "patient"):
            album(place / name, "lab/mel")
    for name in FILES_LEFT_BEHIND:
        for place in (root, root / "lab", root / "lab" / "mel", root / "lab" / "nev" / "patient"):
            (place / name).write_bytes(b"x")
    source = ImageFolder(root=str(root), max_broken=0)
    assert (source.check(), source.remarks()) == ([], [])
    assert (source.domains(), source.classes()) == (("lab",), ("mel", "nev"))
    assert source.identity("x", 0) == before
    assert len(source.load(Geometry(8, 1), "x", 0)) == 2


def test_folders_below_a_class_are_read_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    root = album(tmp_path / "root", "lab/mel", "lab/nev/patient-1/left/2024", "lab/nev/patient-2", "ward/mel", images=3)
    (root / "ward" / "mel" / "gone.png").symlink_to(tmp_path / "gone.png")
    for place in (root, root / "lab"):
        Image.new("L", (8, 8)).save(place / "Beside.PNG")
        (place / "README.txt").write_text("x")
    source = ImageFolder(root=str(root))
    images = source.load(Geometry(8, 1), "x", 0)
    assert np.bincount(images.labels).tolist() == [6, 6]
    assert f"{root}/lab/nev/patient-1/left/2024/0.png" in source.holdings("x").values()
    assert source.remarks() == [
        "images left out, for they lie in no class folder: 2",
        "entries left out, for they are no files but links to nowhere or in a circle, pipes or the like: 1",
    ]
    assert (
        ImageFolder(root=str(root), folders=["ward"]).check()[0].found
        == "images of one class only (mel), and 1 that lie in no class folder"
    )


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    """Every folder is read once, whichever way leads to it; links to other folders are followed."""
    root = album(tmp_path / "root", "lab/mel", "lab/nev/patient")
    other = album(tmp_path / "disk", "patient-3", images=2) / "patient-3"
    nev = root / "lab" / "nev"
    for name, to in {
        "self": "self",
        "here": ".",
        "up": "../..",
        "above": "../../..",
        "again": "patient",
        "patient/back": "..",
    }.items():
        (nev / name).symlink_to(to)
    assert problem(root).startswith("max_broken: found 6 entries that are no files")
    (nev / "elsewhere").symlink_to(other)
    images = ImageFolder(root=str(root), max_broken=6).load(Geometry(8, 1), "x", 0)
    assert np.bincount(images.labels).tolist() == [1, 3]


def test_a_link_in_place_of_a_folder_that_is_asked_for(tmp_path: Path) -> None:
    root = album(tmp_path / "root", "lab/mel", "lab/nev", "ward/mel", "ward/nev")
    (root / "loop").symlink_to("loop")
    assert ImageFolder(root=str(root), folders=["lab"]).check() == []
    assert ImageFolder(root=str(root), folders=["lab"]).classes() == ("mel", "nev")
    for source in ({}, {"folders": ["loop"]}):
        assert "loop', which cannot be read (Too many levels of symbolic links)" in problem(root, **source)
    assert "It is a link to itself" in problem(root / "loop")
    (root / "ward" / "rare").symlink_to("/gone/from/here")
    assert "ward/rare', which cannot be read (No such file" in problem(root, folders=["ward"])
    assert ImageFolder(root=str(root), folders=["lab"]).check() == []
    with pytest.raises(DataError) as error:
        ImageFolder(root=str(root), folders=["ward"]).load(Geometry(8, 1), "x", 0)
    assert "rare" not in error.value.told


READS_ALL = "this user may read every folder"


@pytest.mark.parametrize("mode", [0o000, 0o600, 0o300])
@pytest.mark.parametrize("closed", ["", "ward", "ward/mel", "ward/mel/patient"])
def test_a_folder_that_may_not_be_read(closed: str, mode: int, tmp_path: Path) -> None:
    """It is named if it is asked for, and left alone if not."""
    root = album(tmp_path / "root", "lab/mel", "lab/nev", "ward/mel/patient", "ward/nev")
    (root / closed).chmod(mode)
    try:
        if os.access(root / closed, os.R_OK | os.X_OK):
            pytest.skip(READS_ALL)
        assert f"'{root / closed}', which cannot be read (Permission denied)" in problem(root, folders=["ward"])
        if closed:
            source = ImageFolder(root=str(root), folders=["lab"])
            assert (source.check(), source.classes()) == ([], ("mel", "nev"))
    finally:
        (root / closed).chmod(0o700)


def test_parts_of_a_data_set_are_no_classes(tmp_path: Path) -> None:
    root = album(tmp_path / "root", "lab/train/mel", "lab/train/nev", "lab/Test/mel", "lab/Test/nev")
    assert "only the classes Test, train, which are parts of a data set" in problem(root)


def test_a_root_that_is_one_folder_too_high_is_asked_about(tmp_path: Path) -> None:
    root = album(tmp_path / "root" / "data", "lab/mel", "lab/nev", "ward/mel", "ward/nev").parent
    (said,) = ImageFolder(root=str(root)).remarks()
    assert "(lab, ward)" in said
    assert ImageFolder(root=str(root), patient=1).remarks() == []  # they are said to be patients
    assert "one folder too high?" in said


def test_a_relative_root_is_told_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    album(tmp_path / "root", "lab/mel", "lab/nev")
    monkeypatch.chdir(tmp_path)
    assert ImageFolder(root="root").check() == []
    assert "found 'gone', which does not exist" in problem(Path("gone"))
    assert f"looked for in the folder where the command is given, '{tmp_path}'" in problem(Path("gone"))
