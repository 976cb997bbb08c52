"""Shifts: what happens to an image depends on the image alone, grows with severity, and is what the family's formula says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import zoom

from fedmerge.data.corrupted_images import Gallery
from fedmerge.data.corruptions._base import SEVERITIES, SHIFTS, Shift, mismatched
from fedmerge.data.corruptions.contrast import Contrast
from fedmerge.data.corruptions.gamma import Gamma
from fedmerge.data.corruptions.noise import Noise
from fedmerge.data.corruptions.shot import Shot
from fedmerge.data.corruptions.stain import Stain
from fedmerge.data.corruptions.window import Window
from fedmerge.data.images import Images


def pictures(n: int, side: int = 32, channels: int = 3) -> np.ndarray:
    """Smooth shapes with edges and texture, in the middle of the range."""
    rng = np.random.default_rng(7)
    coarse = rng.random((n, 8, 8, channels))
    smooth = np.stack([zoom(image, (side / 8, side / 8, 1), order=3) for image in coarse])
    return np.rint(np.clip(0.15 + 0.7 * smooth, 0, 1) * 255).astype(np.uint8)


def images(pixels: np.ndarray) -> Images:
    index = np.arange(len(pixels))
    return Images(pixels, index % 2, index % 3, index, ("a", "b"), ("u", "v", "w"), False)


def made(kind: str, severity: int = 3) -> Shift:
    return SHIFTS.load(kind)(severity=severity)


def far(kind: str, severity: int, pixels: np.ndarray) -> float:
    shifted = made(kind, severity).shifted(pixels, np.arange(len(pixels)), "x", 0)
    return float(np.abs(shifted.astype(float) - pixels).mean())


@pytest.mark.parametrize("kind", SHIFTS.names)
def test_an_image_gets_the_same_whoever_is_with_it(kind: str) -> None:
    pixels = pictures(6)
    every = made(kind).shifted(pixels, np.arange(6), "x", 0)
    assert every.shape == pixels.shape
    assert every.dtype == np.uint8
    some = made(kind).shifted(pixels[[4, 1]], np.array([4, 1]), "x", 0)
    assert np.array_equal(some, every[[4, 1]])


@pytest.mark.parametrize("kind", SHIFTS.names)
def test_a_higher_severity_is_farther_from_the_image(kind: str) -> None:
    pixels = pictures(48)
    distances = [far(kind, severity, pixels) for severity in SEVERITIES]
    assert distances == sorted(distances)
    assert distances[0] > 0.1  # of 255, on these smooth pictures
    assert distances[-1] > 1.5 * distances[0]


@pytest.mark.parametrize("kind", [kind for kind in SHIFTS.names if not SHIFTS.load(kind).color])
def test_one_channel_is_enough_but_for_stains(kind: str) -> None:
    pixels = pictures(2, channels=1)
    assert made(kind).shifted(pixels, np.arange(2), "x", 0).shape == pixels.shape


@pytest.mark.parametrize("kind", ["blur", "motion", "bias_field", "gamma", "window", "contrast"])
def test_a_strength_means_the_same_at_any_size(kind: str) -> None:
    small, large = pictures(8, 32), pictures(8, 128)
    assert far(kind, 3, large) == pytest.approx(far(kind, 3, small), rel=0.3)


def test_formulas_by_hand() -> None:
    rng = np.random.default_rng(0)
    x = rng.random((16, 16, 1)).astype(np.float32)
    np.testing.assert_allclose(Contrast(severity=2).on(x, rng), x.mean() + 0.55 * (x - x.mean()), atol=1e-6)
    np.testing.assert_allclose(Window(severity=3).on(x, rng), 1.9 * (x - 0.5) + 0.5, atol=1e-6)
    bent = Gamma(severity=3).on(x, np.random.default_rng(1))
    assert min(abs(bent - x**1.9).max(), abs(bent - x ** (1 / 1.9)).max()) < 1e-6
    flat = np.full((200, 200, 1), 0.5, np.float32)
    assert (Noise(severity=4).on(flat, rng) - 0.5).std() == pytest.approx(0.18, rel=0.02)
    counts = Shot(severity=2).on(flat, rng)
    assert counts.mean() == pytest.approx(0.5, rel=0.01)
    assert counts.var() == pytest.approx(0.5 / 120, rel=0.03)  # Poisson: variance s x, over s squared


def test_a_stain_of_no_dye_changes_white_by_the_added_amount_alone() -> None:
    white = np.ones((4, 4, 3), np.float32)
    found = Stain(severity=5).on(white, np.random.default_rng(0))
    _, plus = np.random.default_rng(0).uniform(-0.62, 0.62, (2, 3))
    dyes = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    dyes /= np.linalg.norm(dyes, axis=1, keepdims=True)
    np.testing.assert_allclose(found[0, 0], np.exp(-plus / 4 @ dyes), rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["noise", "gamma", "pixelate"]), max_size=3, unique=True), st.data())
def test_a_gallery_shows_each_image_under_each_condition(kinds: list[str], data: st.DataObject) -> None:
    of = images(pictures(5))
    conditions = [made(kind, severity) for kind in kinds for severity in (1, 4)]
    gallery = Gallery(of, conditions, "x", 3)
    assert len(gallery) == 5 * max(1, len(conditions))
    index = np.array(data.draw(st.lists(st.integers(0, len(gallery) - 1), min_size=1, max_size=12)))
    shown = gallery.pixels(index)
    for image, at in zip(shown, index.tolist(), strict=True):
        plain, place = of.pixels[at % 5], at % 5
        wanted = conditions[at // 5].shifted(plain[None], np.array([place]), "x", 3)[0] if conditions else plain
        assert np.array_equal(image, wanted)
        assert gallery.labels[at] == of.labels[place]
    assert gallery.domain_names == (tuple(f"{one.kind()} {one.severity}" for one in conditions) or of.domain_names)


def test_colors_need_three_channels() -> None:
    problems = mismatched([Stain(), Noise(), Stain(severity=1)], 1, "families")
    assert [problem.key for problem in problems] == ["families"]
    assert "'stain'" in problems[0].found
    assert mismatched([Stain(), Noise()], 3, "families") == []
