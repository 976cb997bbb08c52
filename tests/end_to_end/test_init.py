"""`fedmerge init`: a scenario for anybody's images that can be planned and run, with what was assumed, and nothing overwritten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import TINY
from tests.front_door import fedmerge, read

RNG = np.random.default_rng(0)
ONE_CLASS_EACH = {"nevus": 80, "melanoma": 170}


def put(file: Path, shade: int, depth: Any = np.uint8, channels: int = 1) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = (20, 24) if channels == 1 else (20, 24, channels)
    Image.fromarray((shade + RNG.integers(-40, 40, shape)).astype(depth)).save(file)


def folders(root: Path, layout: str, sites: str = "abc", each: int = 10, **how: Any) -> Path:
    """Images below `root`, at places such as `{site}/{label}/{n}.png`."""
    for site in sites:
        for label, shade in ONE_CLASS_EACH.items():
            for n in range(each):
                part = "test" if n % 5 == 4 else "train"
                put(root / layout.format(site=site, label=label, n=n, part=part, patient=f"P{n % 5}"), shade, **how)
    return root


def init(folder: Path, images: Path, *options: str, name: str = "own") -> tuple[str, dict[str, Any]]:
    """What `init` said, and the scenario that it wrote, which it has checked with its sites."""
    ended = fedmerge(folder, "init", name, "--images", str(images), *options)
    assert ended.returncode == 0, ended.stderr
    scenario = next((folder / name / "scenarios").glob("*.yaml"))
    text = scenario.read_text()
    assert all(f"# {line}" in text for line in ended.stdout.splitlines() if line.startswith("- "))
    return ended.stdout, yaml.safe_load(text)


def source_of(folder: Path, site: str, name: str = "own") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / name / "sites" / f"{site}.yaml").read_text())["source"]
    return found


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))


def test_hospitals_and_classes_and_a_run_to_its_report(tmp_path: Path) -> None:
    said, scenario = init(tmp_path, folders(tmp_path / "Skin 2024", "Clinic {site}/{label}/{n}.png", channels=3))
    assert "the folders are <hospital>/<class>; classes 'melanoma', 'nevus'" in said
    assert "'Clinic a' is the target" in said
    assert "PNG of 20 x 24 pixels (median of 60 images), color" in said
    assert (scenario["name"], scenario["question"]) == ("skin_2024", "Which of the classes is it?")  # whichever --target is
    assert (scenario["sites"], scenario["target"]) == (["clinic_b", "clinic_c"], "clinic_a")
    assert scenario["model"]["kwargs"]["in_chans"] == 3
    assert source_of(tmp_path, "clinic_b")["kind"] == "image_folder"
    small = {
        "model": {**TINY, "kwargs": {**TINY["kwargs"], "in_chans": 3}},
        "initialization.source": {"kind": "organ_phantom", "images": 60, "patients": 12},
        "training.max_steps": 2,
    }
    options = [word for key, value in small.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    ended = fedmerge(tmp_path, "simulate", "own/scenarios/skin_2024.yaml", "--out", "run", "--jobs", "1", *options)
    assert ended.returncode == 0, ended.stderr
    assert read(tmp_path / "run/summary.json")["stream"]["samples"] == 20


@pytest.mark.parametrize(
    ("layout", "kind", "words"),
    [
        ("{site}/{label}/{patient}/{n}.png", "image_folder", "<hospital>/<class>/<patient>"),
        ("{site}/{label}/{patient}_{n}.png", "image_folder", "patients are taken from names of files: 15 of them"),
        ("{site}/{part}/{label}/{n}.png", "table", "<hospital>/<part>/<class>"),
        ("{part}/{site}/{label}/{n}.png", "table", "<part>/<hospital>/<class>"),
        ("{site}/{label}/{part}/{n}.png", "table", "<hospital>/<class>/<part>"),
        ("{site}/{patient}{site}/{label}/{n}.png", "table", "<hospital>/<patient>/<class>"),
        ("{label}/hospital_{site}/{n}.png", "table", "<class>/<hospital>"),
        ("all/{site}/{label}/{n}.png", "table", "<folder>/<hospital>/<class>"),
    ],
)
def test_layouts_of_several_hospitals(tmp_path: Path, layout: str, kind: str, words: str) -> None:
    said, scenario = init(tmp_path, folders(tmp_path / "images", layout))
    assert words in said
    assert len(scenario["sites"]) == 2
    source = source_of(tmp_path, scenario["sites"][0])
    assert source["kind"] == kind
    assert source.get("take", []) == (["train"] if "{part}" in layout else [])
    assert "take" not in source_of(tmp_path, scenario["target"])


@pytest.mark.parametrize(
    "layout", ["{label}/{n}.png", "{part}/{label}/{n}.png", "{label}/{patient}/{n}.png", "only/{label}/{n}.png"]
)
def test_one_hospital_is_said_and_shared_out(tmp_path: Path, layout: str) -> None:
    said, scenario = init(tmp_path, folders(tmp_path / "images", layout, sites="a", each=30))
    assert "there is only one hospital" in said
    assert "add images of other hospitals" in said
    assert (scenario["sites"], scenario["target"]) == (["part_1", "part_2"], "target")
    if "{part}" in layout:
        assert source_of(tmp_path, "target")["take"] == ["test"]
        assert source_of(tmp_path, "part_1")["take"] == ["train"]


def test_of_two_hospitals_both_train(tmp_path: Path) -> None:
    said, scenario = init(tmp_path, folders(tmp_path / "images", "{site}/{label}/{n}.png", sites="ab"))
    assert "both hospitals train on 70% of their images" in said
    assert (scenario["sites"], scenario["target"]) == (["a", "b"], "target")
    said, scenario = init(tmp_path, tmp_path / "images", "--target", "a", name="chosen")
    assert "only 'b' trains, so there is nothing to merge" in said
    assert (scenario["sites"], scenario["target"]) == (["b"], "a")


def test_a_table_with_names_without_ends_numbers_and_gaps(tmp_path: Path) -> None:
    lines = ["Image ID;DX;Patient_ID;Center;set"]
    for n in range(60):
        if n != 7:
            put(tmp_path / f"export/pictures/IM{n:02}.jpg", 80 + 90 * (n % 2))
        lines.append(f"IM{n:02};{n % 2 if n != 9 else ''};{n // 2};Süd {n % 3};{'test' if n % 4 == 0 else 'train'}")
    (tmp_path / "export/cohort.csv").write_bytes("\n".join(lines).encode("cp1252"))
    said, scenario = init(tmp_path, tmp_path / "export")
    assert "path is column 'Image ID', label is column 'DX', patient is column 'Patient_ID', hospital is column 'Center'" in said
    assert "rows left out, for their file is missing: 1" in said
    assert "rows left out, for they have no label: 1" in said
    source = source_of(tmp_path, scenario["sites"][0])
    assert (source["suffix"], source["encoding"], source["take"]) == (".jpg", "cp1252", ["train"])
    assert source["labels"] == {"0": "class_0", "1": "class_1", "": None}


def test_deep_images_and_scans(tmp_path: Path) -> None:
    said, scenario = init(tmp_path, folders(tmp_path / "images", "{site}/{label}/{n}.png", depth=np.uint16))
    assert "gray, more than 8 bits" in said
    assert "gray_range" not in source_of(tmp_path, "b")  # the source finds that of its detector by itself
    nibabel = pytest.importorskip("nibabel")
    for site in "abc":
        for label, shade in ONE_CLASS_EACH.items():
            for n in range(4):
                file = tmp_path / f"scans/{site}/{label}/{n}.nii.gz"
                file.parent.mkdir(parents=True, exist_ok=True)
                values = (RNG.normal(size=(12, 12, 4)) * 50 + shade - 120).astype(np.float32)
                nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), file)
    said, scenario = init(tmp_path, tmp_path / "scans", name="scans")
    assert "NIfTI of 12 x 12 pixels" in said
    ranges = [source_of(tmp_path, site, "scans")["gray_range"] for site in "abc"]
    assert ranges[0] == ranges[1] == ranges[2]
    assert scenario["model"]["kwargs"]["img_size"] == 32


def nothing(root: Path) -> None:
    root.mkdir()


def flat(root: Path) -> None:
    put(root / "1.png", 80)


def one_folder(root: Path) -> None:
    put(root / "nevus/1.png", 80)


def unlike(root: Path) -> None:
    for site, label in (("a", "nevus"), ("a", "melanoma"), ("b", "keratosis"), ("b", "cancer")):
        put(root / site / label / "1.png", 80)


def deep(root: Path) -> None:
    folders(root, "{site}/x{site}/y{site}/{label}/{n}.png")


def no_labels(root: Path) -> None:
    put(root / "images/1.png", 80)
    (root / "table.csv").write_text("file,age\n1.png,70\n1.png,71\n")


def unread(root: Path) -> None:
    for site in "abc":
        for label in ONE_CLASS_EACH:
            (root / site / label).mkdir(parents=True)
            (root / site / label / "1.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda root: None, "found nothing at"),
        (nothing, "found no image, and 0 other files; expected one of: ROOT/<hospital>/<class>/*"),
        (flat, "found images in no folder (1), so that their classes are not known; expected one of"),
        (one_folder, "images of one folder only"),
        (unlike, "of which none recur as classes do; expected one of"),
        (deep, "3 levels of folders above those that recur as classes do ('melanoma', 'nevus')"),
        (no_labels, "found the columns 'file' (1 values), 'age' (2 values); expected one with the label (called label, class, dx"),
        (unread, "found no image that can be read among 6"),
    ],
)
def test_what_is_not_known_is_one_clear_error(tmp_path: Path, make: Callable[[Path], None], found: str) -> None:
    make(tmp_path / "images")
    ended = fedmerge(tmp_path, "init", "own", "--images", "images")
    assert ended.returncode == 2
    assert found in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "own").exists()


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path: Path) -> None:
    images = folders(tmp_path / "images", "{site}/{label}/{n}.png")
    (tmp_path / "own/sites").mkdir(parents=True)
    (tmp_path / "own/sites/b.yaml").write_text("mine")
    ended = fedmerge(tmp_path, "init", "own", "--images", str(images))
    assert ended.returncode == 2
    assert "found sites/b.yaml; expected none of the files to write" in ended.stderr
    assert (tmp_path / "own/sites/b.yaml").read_text() == "mine"
    assert sorted(path.name for path in (tmp_path / "own").rglob("*")) == ["b.yaml", "sites"]
    ended = fedmerge(tmp_path, "init", "own", "--images", str(images), "--target", "d")
    assert "--target: found 'd'; expected one of several hospitals" in ended.stderr
    (images / "a/Nevus").mkdir()
    put(images / "a/Nevus/1.png", 80)  # two names that a person takes for one
    ended = fedmerge(tmp_path, "init", "other", "--images", str(images))
    assert ended.returncode == 2
    assert "differ in case only" in ended.stderr
    assert not (tmp_path / "other").exists()
    (tmp_path / "file").write_text("")
    ended = fedmerge(tmp_path, "init", "file", "--images", str(images), "--target", "b")
    assert ended.returncode == 2
    assert "file: found something else at this place" in ended.stderr
