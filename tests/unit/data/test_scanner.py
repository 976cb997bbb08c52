"""The scanner: each effect by its closed form, and the same noise for the same image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.data.images import Images
from fedmerge.data.scanner import Scanner
from fedmerge.errors import DataError


def images(pixels: np.ndarray) -> Images:
    index = np.arange(len(pixels))
    return Images(pixels, index % 2, index * 0, index, ("a", "b"), ("d",), False)


def flat(value: int, n: int = 4, side: int = 32, channels: int = 1, dtype: Any = np.uint8) -> Images:
    return images(np.full((n, side, side, channels), value, dtype))


def scanned(scanner: Scanner, of: Images, owner: str = "x", seed: int = 0) -> np.ndarray:
    return scanner.scan(of, owner, seed).pixels


def test_the_default_takes_photographs_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    assert np.array_equal(scanned(Scanner(), images(pixels)), pixels)


@pytest.mark.parametrize(("hounsfield", "gray"), [(-160, 0), (40, 128), (240, 255), (-1000, 0), (140, 191)])
def test_the_window_maps_hounsfield_units(hounsfield: int, gray: int) -> None:
    assert scanned(Scanner(window=(40, 400)), flat(hounsfield, dtype=np.int16))[0, 0, 0, 0] == gray


@pytest.mark.parametrize(
    ("scanner", "gray", "wanted"),
    [
        (Scanner(gamma=2), 128, 255 * (128 / 255) ** 2),
        (Scanner(contrast=2), 100, 255 * ((100 / 255 - 0.5) * 2 + 0.5)),
        (Scanner(contrast=2), 10, 0),
        (Scanner(blur=2), 77, 77),
        (Scanner(resolution=0.5), 77, 77),
    ],
)
def test_effects_on_one_shade_by_hand(scanner: Scanner, gray: int, wanted: float) -> None:
    assert abs(scanned(scanner, flat(gray)).astype(float) - wanted).max() <= 0.51


@pytest.mark.parametrize("grain", [0, 0.5, 1.5])
def test_the_noise_has_the_level_that_was_asked_for(grain: float) -> None:
    found = scanned(Scanner(noise=0.05, grain=grain), flat(128, n=60)).astype(float) / 255
    assert found.std() == pytest.approx(0.05, rel=0.05)
    assert found.mean() == pytest.approx(128 / 255, abs=0.005)
    neighbors = np.corrcoef(found[:, :-1].ravel(), found[:, 1:].ravel())[0, 1]
    assert (neighbors > 0.2) == (grain > 0)


def test_an_image_has_its_own_noise_however_many_there_are() -> None:
    scanner = Scanner(noise=0.1)
    many, few = scanned(scanner, flat(128, n=700)), scanned(scanner, flat(128, n=3))
    assert np.array_equal(many[:3], few)
    assert not np.array_equal(many[0], many[1])
    assert not np.array_equal(scanned(scanner, flat(128), owner="y"), scanned(scanner, flat(128)))
    assert not np.array_equal(scanned(scanner, flat(128), seed=1), scanned(scanner, flat(128)))


def test_a_tint_needs_colors() -> None:
    red = scanned(Scanner(tint=(1.5, 1, 0.5)), flat(100, channels=3))[0, 0, 0]
    assert red.tolist() == [150, 100, 50]
    with pytest.raises(DataError, match=r"site 'x': scanner\.tint"):
        scanned(Scanner(tint=(1.5, 1, 0.5)), flat(100))


SCANNERS = st.builds(
    Scanner,
    resolution=st.floats(0.1, 1),
    blur=st.floats(0, 3),
    noise=st.floats(0, 1),
    grain=st.floats(0, 2),
    contrast=st.floats(0.1, 5),
    gamma=st.floats(0.1, 5),
)


@settings(max_examples=25, deadline=None)
@given(SCANNERS, st.integers(0, 255), st.integers(8, 20))
def test_any_scanner_gives_images_of_the_same_shape(scanner: Scanner, gray: int, side: int) -> None:
    before = flat(gray, n=2, side=side)
    after = scanner.scan(before, "x", 0)
    assert after.pixels.shape == before.pixels.shape
    assert after.pixels.dtype == np.uint8
    assert np.array_equal(after.labels, before.labels)
