"""Image folders: what is there is used, what is broken is named, and no two hospitals hold one image."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedmerge.data.datasets._base import Geometry
from fedmerge.data.datasets.image_folder import ImageFolder
from fedmerge.data.partition import own_split
from fedmerge.errors import DataError
from fedmerge.experiment.validation.sites import copied
from fedmerge.federated.site import Site

GEOMETRY = Geometry(16, 3)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Two domains of two classes, ten images each; the shade tells the class."""
    for domain in ("lab", "ward"):
        for shade, label in ((50, "cat"), (200, "dog")):
            (tmp_path / domain / label).mkdir(parents=True)
            for number in range(10):
                Image.new("RGB", (20, 24), (shade, number, 0)).save(tmp_path / domain / label / f"{number}.png")
    return tmp_path


def folder(root: Path, **fields: Any) -> ImageFolder:
    return ImageFolder(root=str(root), **fields)


def test_images_labels_and_domains_are_those_of_the_folders(album: Path) -> None:
    images = folder(album, flips=True).load(GEOMETRY, "x", 0)
    assert images.pixels.shape == (40, 16, 16, 3)
    assert images.pixels.dtype == np.uint8
    assert (images.classes, images.domain_names, images.flips) == (("cat", "dog"), ("lab", "ward"), True)
    assert np.array_equal(images.pixels[:, 8, 8, 0] > 100, images.labels == 1)
    assert np.bincount(images.domains).tolist() == [20, 20]
    assert len(set(images.groups.tolist())) == 40


def test_gray_images_and_one_channel(album: Path) -> None:
    Image.new("L", (20, 20), 120).save(album / "lab" / "cat" / "gray.png")
    assert folder(album).load(GEOMETRY, "x", 0).pixels.shape == (41, 16, 16, 3)
    assert folder(album).load(Geometry(8, 1), "x", 0).pixels.shape == (41, 8, 8, 1)


def test_a_hospital_may_hold_some_domains(album: Path) -> None:
    images = folder(album, folders=["ward"]).load(GEOMETRY, "x", 0)
    assert images.domain_names == ("ward",)
    assert len(images) == 20


@pytest.mark.parametrize("split", [{"by": "label_skew", "alpha": 5}, {"by": "quantity", "shares": [1, 2, 1]}])
def test_parts_share_nothing_and_leave_nothing(album: Path, split: dict[str, Any]) -> None:
    held = [folder(album, split={**split, "parts": 3, "part": part}).holdings("x") for part in range(3)]
    assert sum(len(part) for part in held) == len({path for part in held for path in part}) == 40


def test_pixels_are_kept_and_made_again_when_a_file_changes(album: Path) -> None:
    first = folder(album).load(GEOMETRY, "x", 0)
    file = album / "lab" / "cat" / "0.png"
    Image.new("RGB", (20, 24), (90, 90, 90)).save(file)
    os.utime(file, ns=(1, 1))
    second = folder(album).load(GEOMETRY, "x", 0)
    assert first.pixels[0, 8, 8, 0] == 50
    assert second.pixels[0, 8, 8, 0] == 90
    assert np.array_equal(first.pixels[1:], second.pixels[1:])


def test_the_same_files_have_the_same_identity_wherever_they_lie(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALBUM", str(album))
    assert ImageFolder(root="${ALBUM}").identity("x", 0) == folder(album).identity("y", 1)
    assert folder(album, folders=["lab"]).identity("x", 0) != folder(album).identity("x", 0)


def test_a_truncated_image_is_named_and_left_out_up_to_the_limit(album: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = album / "lab" / "dog" / "whole.jpg"
    Image.effect_noise((64, 64), 40).save(whole)
    (album / "lab" / "dog" / "half.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (album / "lab" / "dog" / "notes.png").write_text("no image")
    images = folder(album, max_broken=2).load(GEOMETRY, "x", 0)
    assert len(images) == 41
    assert "lab/dog/half.jpg" in caplog.text
    assert "lab/dog/notes.png" in caplog.text
    with pytest.raises(DataError) as error:
        folder(album, max_broken=1).load(GEOMETRY, "x", 0)
    for words in ("site 'x'", "lab/dog/half.jpg (", "lab/dog/notes.png (no image)", "at most 1", "max_broken"):
        assert words in str(error.value)


def test_hidden_files_are_left_alone_and_links_to_nowhere_are_named(album: Path, caplog: pytest.LogCaptureFixture) -> None:
    (album / "lab" / "cat" / ".DS_Store").write_text("x")
    (album / "lab" / "cat" / "gone.png").symlink_to(album / "nowhere.png")
    assert len(folder(album).load(GEOMETRY, "x", 0)) == 40
    assert "lab/cat/gone.png (no regular file)" in caplog.text


def problem(source: ImageFolder) -> str:
    (found,) = source.check()
    return str(found)


def test_a_root_that_is_not_there_says_where_to_get_it(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    said = problem(ImageFolder(root="${NOWHERE}/wbc", hint="example.org"))
    assert "NOWHERE is not set" in said
    assert "Set NOWHERE to the folder in which wbc lies" in said
    assert "example.org" in said
    assert "does not exist" in problem(folder(album / "gone"))
    assert "not a folder" in problem(folder(album / "lab" / "cat" / "0.png"))


def test_an_empty_folder_and_one_class(tmp_path: Path, album: Path) -> None:
    (album.parent / "empty").mkdir(exist_ok=True)
    assert "no image" in problem(folder(album.parent / "empty"))
    assert "did you mean 'ward'" in problem(folder(album, folders=["wards"]))
    for domain in ("lab", "ward"):
        for file in (album / domain / "dog").iterdir():
            file.unlink()
        (album / domain / "dog").rmdir()
    assert "one class only (cat)" in problem(folder(album))


@pytest.fixture
def wards(tmp_path: Path) -> Path:
    """Twelve patients of two classes, five images each, in folders of their own or with their number in the file's name."""
    for number in range(60):
        label, patient = ("cat", "dog")[number % 2], number % 12
        for place in (tmp_path / "folders/ward" / label / f"P{patient}", tmp_path / "names/ward" / label):
            place.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), number).save(place / f"P{patient}_{number}.png")
    return tmp_path


@pytest.mark.parametrize(("layout", "patient"), [("names", r"/P(\d+)_"), ("folders", "^[^/]+/[^/]+/([^/]+)/")])
def test_images_of_a_patient_stay_together(wards: Path, layout: str, patient: str) -> None:
    source = folder(wards / layout, patient=patient)
    assert source.check() == []
    images = source.load(GEOMETRY, "x", 0)
    assert np.bincount(images.groups).tolist() == [5] * 12
    train, held = own_split(images, "x", 0.3, 0)
    assert not set(images.groups[train]) & set(images.groups[held])
    paths = [folder(wards / layout, patient=patient, split={"by": "label_skew", "part": part}).holdings("x") for part in (0, 1)]
    patients = [{re.search(patient, path.split(f"{layout}/")[1])[1] for path in part.values()} for part in paths]  # type: ignore[index]
    assert not patients[0] & patients[1]
    assert len(patients[0] | patients[1]) == 12
    assert sum(map(len, paths)) == 60


def test_without_the_key_nothing_is_known_of_patients(wards: Path) -> None:
    assert not folder(wards / "names").knows_patients
    assert folder(wards / "names", patient=r"/P(\d+)_").knows_patients
    assert folder(wards / "names").identity("x", 0) != folder(wards / "names", patient=r"/P(\d+)_").identity("x", 0)


@pytest.mark.parametrize(
    ("patient", "said"),
    [(r"/P\d+_", "0 groups in it; expected one"), ("(P", "no regular expression (missing )"), (r"(P)(\d+)", "2 groups in it")],
)
def test_expressions_that_cannot_find_a_patient(wards: Path, patient: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        folder(wards / "names", patient=patient)


def test_paths_without_a_patient_are_counted(wards: Path) -> None:
    Image.new("L", (8, 8), 7).save(wards / "names/ward/cat/other.png")
    (problem,) = folder(wards / "names", patient=r"/P(\d+)_").check()
    assert (problem.key, problem.found) == ("patient", "'/P(\\d+)_', which finds no patient in 1 of 61 paths below the root")


def test_links_are_the_files_that_they_lead_to(album: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Symbolic links to files and to folders, and hard links; a copy is another file with the same content."""
    other = tmp_path_factory.mktemp("study") / "images"
    (other / "seen" / "cat").mkdir(parents=True)
    (other / "seen" / "dog").symlink_to(album / "lab" / "dog")
    (other / "seen" / "cat" / "a.png").symlink_to(album / "lab" / "cat" / "0.png")
    os.link(album / "lab" / "cat" / "1.png", other / "seen" / "cat" / "b.png")
    (other / "seen" / "cat" / "c.png").write_bytes((album / "lab" / "cat" / "2.png").read_bytes())
    mine, theirs = folder(album, folders=["lab"]), folder(other)
    assert len(mine.holdings("x").keys() & theirs.holdings("y").keys()) == 12
    assert len(mine.contents("x").keys() & theirs.contents("y").keys()) == 13


def test_copies_are_counted_and_those_of_two_classes_named_in_the_log(album: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = folder(album, folders=["lab"])
    assert {len(classes) for classes in source.contents("x").values()} == {1}
    (album / "lab/cat/copy.png").write_bytes((album / "lab/cat/0.png").read_bytes())
    (album / "lab/cat/wrong.png").write_bytes((album / "lab/dog/0.png").read_bytes())
    assert sorted(classes for classes in source.contents("x").values() if len(classes) > 1) == [("cat", "cat"), ("cat", "dog")]
    source.load(GEOMETRY, "x", 0)
    assert "files of different classes with the same content: lab/cat/wrong.png = lab/dog/0.png" in caplog.text
    assert "copy.png" not in caplog.text
    site = Site.model_validate({"name": "x", "source": {"kind": "image_folder", "root": str(album), "folders": ["lab"]}})
    (line,) = copied([site], ())
    assert line.endswith("which validation may hold: 4; 2 of them are in different classes, as their own log says")
    assert "png" not in line


def test_a_folder_level_is_the_patient(wards: Path) -> None:
    for number, file in enumerate(sorted((wards / "folders/ward").rglob("*.png"))):
        (file.parent / f"study{number % 2}").mkdir(exist_ok=True)
        file.rename(file.parent / f"study{number % 2}" / file.name)
    first, second = folder(wards / "folders", patient=1), folder(wards / "folders", patient=2)
    assert first.check() == []
    by_pattern = folder(wards / "folders", patient="^[^/]+/[^/]+/([^/]+)/").load(GEOMETRY, "x", 0)
    assert np.array_equal(first.load(GEOMETRY, "x", 0).groups, by_pattern.groups)
    assert len(np.unique(second.load(GEOMETRY, "x", 0).groups)) == 2
    (problem,) = folder(wards / "folders", patient=3).check()
    assert problem.found == "'3', which finds no patient in 60 of 60 paths below the root"
    assert problem.expected == "3 folders or more below the class around every image"


@pytest.mark.parametrize("patient", [0, -1, 1.5, True])
def test_levels_count_from_one(wards: Path, patient: Any) -> None:
    with pytest.raises(ValueError, match="patient"):
        folder(wards / "names", patient=patient)


@pytest.mark.parametrize("patient", [r"(P?)", r"ward/(x?)", r"/(P\d+)?"])
def test_an_expression_that_finds_nothing_finds_no_patient(wards: Path, patient: str) -> None:
    """Otherwise all images are those of one patient, who has no name."""
    (problem,) = folder(wards / "names", patient=patient).check()
    assert "finds no patient in 60 of 60 paths" in problem.found
    assert "<domain>/<class>/<file>" in problem.expected
