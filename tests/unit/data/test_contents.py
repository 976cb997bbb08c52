"""Which files are which: the bytes decide, wherever they lie, and they are read again only where something has changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fedmerge.data.datasets import _contents
from fedmerge.data.datasets._base import Geometry
from fedmerge.data.datasets._contents import digests
from fedmerge.data.datasets._image_files import items_of
from fedmerge.data.datasets.image_folder import ImageFolder
from tests.unit.data.test_image_folder import album as album

GEOMETRY = Geometry(8, 3)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are taken to be as they are however young they are."""
    monkeypatch.setattr(_contents, "SETTLED_NS", -(10**12))


def folder(root: Path) -> ImageFolder:
    return ImageFolder(root=str(root))


def test_other_bytes_of_the_same_name_size_and_time_are_other_images(album: Path) -> None:
    file = album / "lab" / "cat" / "0.png"
    bitmap = file.with_suffix(".bmp")
    shutil.copy(file, bitmap)
    before, was, first = folder(album).identity("x", 0), bitmap.stat(), folder(album).load(GEOMETRY, "x", 0)
    shutil.copy(album / "lab" / "cat" / "1.png", bitmap)
    os.truncate(bitmap, was.st_size)
    os.utime(bitmap, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (bitmap.stat().st_size, bitmap.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
    assert folder(album).identity("x", 0) != before
    assert (folder(album).load(GEOMETRY, "x", 0).pixels != first.pixels).any()


def test_a_copy_is_the_same_images_and_a_renamed_file_is_not(album: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(album, copy)
    os.utime(copy / "lab" / "cat" / "0.png", ns=(1, 1))
    before = ImageFolder(root=str(copy), folders=("lab",)).identity("x", 0)
    assert before == ImageFolder(root=str(album), folders=("lab",)).identity("y", 1)
    (copy / "lab" / "cat" / "0.png").rename(copy / "lab" / "dog" / "moved.png")
    assert before != ImageFolder(root=str(copy), folders=("lab",)).identity("x", 0)


@pytest.mark.usefixtures("settled")
def test_bytes_are_read_once_until_something_changes(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = digests("x", album, items_of(album, "lab"))
    read: list[int] = []
    plainly = _contents._read

    def counted(paths: list[Path]) -> tuple[str, ...]:
        read.append(len(paths))
        return plainly(paths)

    monkeypatch.setattr(_contents, "_read", counted)
    assert digests("x", album, items_of(album, "lab")) == found
    assert read == []
    file = album / "lab" / "cat" / "0.png"
    was = file.stat()
    file.write_bytes(bytes(reversed(file.read_bytes())))
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert digests("x", album, items_of(album, "lab")) != found
    assert read == [20]


@pytest.mark.usefixtures("settled")
def test_a_file_that_cannot_be_read_is_tried_again(album: Path) -> None:
    items = items_of(album, "lab")
    file = album / "lab" / "cat" / "0.png"
    file.rename(file.with_suffix(".away"))
    assert digests("x", album, items).count("") == 1
    file.with_suffix(".away").rename(file)
    assert "" not in digests("x", album, items)


def test_files_that_have_only_just_been_written_are_read_again(album: Path) -> None:
    items = items_of(album, "lab")
    first = digests("x", album, items)
    file = album / "lab" / "cat" / "0.png"
    file.write_bytes(bytes(reversed(file.read_bytes())))
    assert digests("x", album, items) != first  # even with the facts of before
