"""Where decoded images are kept, how they get there whole, and what happens where they cannot."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fedmerge.data.cache import SMALL, Arrays, Rows, cached_rows, changed, folder, unusable
from fedmerge.data.images import Images
from fedmerge.errors import DataError

SHAPE = (7, 3, 2)
PIXELS = np.arange(42, dtype=np.uint8).reshape(SHAPE)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "x"


def fill(rows: Rows) -> Arrays:
    rows.begin(SHAPE, np.uint8)
    rows.put(3, PIXELS[3:])
    rows.put(0, PIXELS[:3])
    return {"beside": np.array([1, 2])}


def never(rows: Rows) -> Arrays:
    raise AssertionError("it is there already")


def loaded() -> Arrays:
    return cached_rows("x", "key", fill)


def held_bytes(pixels: np.ndarray) -> int:
    none = np.zeros(len(pixels), np.int64)
    return Images(pixels, none, none, none, ("a",), ("b",), flips=False).held_bytes


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a disk that has no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_is_named_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("FEDMERGE_CACHE", "~/here")
    assert folder() == Path.home() / "here"
    monkeypatch.setenv("FEDMERGE_CACHE", "")
    assert folder() == tmp_path / "xdg" / "fedmerge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache" / "fedmerge"


@pytest.mark.usefixtures("cache")
def test_rows_are_made_once_and_mapped() -> None:
    first, again = loaded(), cached_rows("x", "key", never)
    for found in (first, again):
        assert np.array_equal(found["pixels"], PIXELS)
        assert held_bytes(found["pixels"]) == held_bytes(np.broadcast_to(found["pixels"][..., None], (*SHAPE, 3))) == 0
        assert found["beside"].tolist() == [1, 2]
    assert held_bytes(np.array(first["pixels"])) == 42


def test_what_is_not_whole_is_made_again(cache: Path) -> None:
    loaded()
    os.truncate(cache / "key.npy", (cache / "key.npy").stat().st_size - 1)
    assert np.array_equal(loaded()["pixels"], PIXELS)
    (cache / "key.npz").unlink()
    assert np.array_equal(loaded()["pixels"], PIXELS)
    (cache / "key.npy").write_bytes(b"")
    assert np.array_equal(loaded()["pixels"], PIXELS)
    assert np.array_equal(cached_rows("x", "key", never)["pixels"], PIXELS)


def test_pixels_that_are_others_than_were_written_are_made_again(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded()
    file, facts = cache / "key.npy", cache / "key.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"\xff")
    found = loaded()
    assert np.array_equal(found["pixels"], PIXELS)
    assert set(found) == {"pixels", "beside"}
    assert "key.npy: found other pixels than were written; they are made again" in caplog.text
    assert file.read_bytes() == whole
    file.write_bytes(whole[:-1] + b"\xff")
    with np.load(facts) as stored:
        np.savez(facts, beside=stored["beside"])  # as an older version has left it
    assert cached_rows("x", "key", never)["pixels"][-1, -1, -1] == 255
    monkeypatch.setattr("fedmerge.data.cache.MOST_CHECKED", PIXELS.nbytes - 1)
    facts.unlink()
    assert np.array_equal(loaded()["pixels"], PIXELS)
    assert np.array_equal(cached_rows("x", "key", never)["pixels"], PIXELS)


def test_an_error_leaves_nothing_and_drafts_of_the_dead_are_swept(cache: Path) -> None:
    def fails(rows: Rows) -> Arrays:
        fill(rows)
        raise OSError("a disk that images come from")

    with pytest.raises(OSError, match="a disk that images come from"):
        cached_rows("x", "key", fails)
    assert [file.name for file in cache.iterdir()] == ["making.lock"]
    (cache / ".other.npy-12-ab.draft").write_bytes(b"half")
    loaded()
    assert sorted(file.name for file in cache.iterdir()) == ["key.npy", "key.npz", "making.lock"]


@pytest.mark.parametrize("chosen", [[], [0, 1, 2, 3, 4, 5, 6], [0, 1, 4, 6], [2, 3, 4], [6]])
@pytest.mark.usefixtures("cache")
def test_some_rows_are_kept(chosen: list[int]) -> None:
    def some(rows: Rows) -> Arrays:
        fill(rows)
        rows.keep(np.array(chosen, np.int64))
        return {}

    rows = Rows()
    some(rows)
    assert np.array_equal(rows.done(), PIXELS[chosen])
    for make in (some, never):
        assert np.array_equal(cached_rows("x", "key", make)["pixels"], PIXELS[chosen])


def test_without_a_folder_to_write_to_it_goes_on_in_memory_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "file" / "cache"))
    found = loaded()
    assert np.array_equal(found["pixels"], PIXELS) and held_bytes(found["pixels"]) == 42
    said = f"site 'x': cache folder '{tmp_path}/file/cache' cannot be used (Not a directory): 4.2e-05 MB of images are made anew"
    assert said in caplog.text
    assert unusable()[0].startswith(
        f"cache of decoded images: found '{tmp_path}/file/cache', which cannot be written (Not a directory)"
    )


def test_a_disk_that_fills_up_is_no_end(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert unusable() == []
    with largest_file(150):  # the header goes into that, and some rows
        found = loaded()
    assert np.array_equal(found["pixels"], PIXELS)
    assert "cannot be used (File too large)" in caplog.text
    assert not list(cache.glob("*.np*")) + list(cache.glob(".*draft"))
    assert np.array_equal(loaded()["pixels"], PIXELS)
    assert (cache / "key.npy").exists()


def test_rows_that_go_nowhere_are_one_clear_error(cache: Path) -> None:
    """Ten terabytes, which are more than this disk and this memory: known before the first image is decoded."""

    def too_many(rows: Rows) -> Arrays:
        rows.begin((10**7, 1000, 1000), np.uint8)
        raise AssertionError("there is no room for it")

    with pytest.raises(DataError) as error:
        cached_rows("x", "key", too_many)
    text, told = str(error.value), error.value.told
    assert text.startswith(f"site 'x': cache folder '{cache.parent}': found No space left on device; expected ")
    assert "expected room for 1e+04 GB of images, which do not go into the memory either" in text
    assert text.endswith("Make room there, or set FEDMERGE_CACHE to a folder that can hold them")
    assert "/" not in told and told.startswith("its images take 1e+04 GB, and the cache folder cannot hold them (")
    assert not list(cache.glob("*.np*")) + list(cache.glob(".*draft"))


MAKER = """
import sys, time
import numpy as np
from fedmerge.data.cache import cached_rows
def make(rows):
    with open(sys.argv[1], "a") as log: log.write("made\\n")
    time.sleep(0.3)
    rows.begin((5, 2), np.uint8)
    rows.put(0, np.full((5, 2), 7, np.uint8))
    return {}
print(int(cached_rows("x", "key", make)["pixels"].sum()))
"""


@pytest.mark.usefixtures("cache")
def test_two_processes_make_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKER, str(tmp_path / "log")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["70", "70"]
    assert (tmp_path / "log").read_text() == "made\n"


@pytest.mark.parametrize("key", ["", "key"])
def test_many_changed_images_lie_on_disk(key: str, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    many = np.broadcast_to(few[:, None], (40, 1 + SMALL // few.size, 8, 8, 1)).reshape(-1, 8, 8, 1)

    def change(pixels: np.ndarray, places: np.ndarray) -> np.ndarray:
        return pixels + places[:, None, None, None].astype(np.uint8)

    found, small = changed("x", key, many, change), changed("x", key, few, change)
    assert held_bytes(found) == 0 and held_bytes(small) == few.size
    assert np.array_equal(found, change(many, np.arange(len(many)))) and np.array_equal(small, change(few, np.arange(40)))
    assert len(list(cache.glob("*.npy"))) == bool(key)
    assert not caplog.text
