"""Shifts: what happens to an image depends on the image alone, grows with severity, and is what the family's formula says."""

from __future__ import annotations

import colorsys
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from pydantic import ValidationError
from scipy.ndimage import zoom
from torchvision.transforms.functional import gaussian_blur

from fedmerge.data.corrupted_images import Gallery
from fedmerge.data.corruptions._base import SEVERITIES, SHIFTS, Shift, mismatched, published_for
from fedmerge.data.corruptions.contrast import Contrast
from fedmerge.data.corruptions.gamma import Gamma
from fedmerge.data.corruptions.noise import Noise
from fedmerge.data.corruptions.shot import Shot
from fedmerge.data.corruptions.stain import Stain
from fedmerge.data.corruptions.window import Window
from fedmerge.data.images import Images
from fedmerge.stream.schedules.corruption import Corruption


def pictures(n: int, side: int = 32, channels: int = 3) -> np.ndarray:
    """Smooth shapes with edges and texture, in the middle of the range."""
    return drawn(n, side, channels).copy()


@cache
def drawn(n: int, side: int, channels: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    coarse = rng.random((n, 8, 8, channels))
    smooth = np.stack([zoom(image, (side / 8, side / 8, 1), order=3) for image in coarse])
    return np.rint(np.clip(0.15 + 0.7 * smooth, 0, 1) * 255).astype(np.uint8)


def images(pixels: np.ndarray) -> Images:
    index = np.arange(len(pixels))
    return Images(pixels, index % 2, index % 3, index, ("a", "b"), ("u", "v", "w"), False)


OWN = [kind for kind in SHIFTS.names if SHIFTS.load(kind).strengths]
PUBLISHED = {kind: tuple(SHIFTS.load(kind)().tables) for kind in SHIFTS.names}
UNEVEN = {"black_corner", "saturate"}
"""Families of which the source itself does not get harder with every severity."""


def made(kind: str, severity: int = 3, **given: object) -> Shift:
    return SHIFTS.load(kind)(severity=severity, **given)


def far(kind: str, severity: int, pixels: np.ndarray, **given: object) -> float:
    shifted = made(kind, severity, **given).shifted(pixels, np.arange(len(pixels)), "x", 0)
    return float(np.abs(shifted.astype(float) - pixels).mean())


@pytest.mark.parametrize("kind", SHIFTS.names)
def test_an_image_gets_the_same_whoever_is_with_it(kind: str) -> None:
    pixels = pictures(6)
    every = made(kind).shifted(pixels, np.arange(6), "x", 0)
    assert every.shape == pixels.shape
    assert every.dtype == np.uint8
    some = made(kind).shifted(pixels[[4, 1]], np.array([4, 1]), "x", 0)
    assert np.array_equal(some, every[[4, 1]])


@pytest.mark.parametrize("kind", OWN)
def test_a_higher_severity_is_farther_from_the_image(kind: str) -> None:
    pixels = pictures(48)
    distances = [far(kind, severity, pixels, strength="own") for severity in SEVERITIES]
    assert distances == sorted(distances)
    assert distances[0] > 0.1  # of 255, on these smooth pictures
    assert distances[-1] > 1.5 * distances[0]


@pytest.mark.parametrize(("kind", "modality"), [(kind, modality) for kind in SHIFTS.names for modality in PUBLISHED[kind]])
def test_published_severities_are_complete_and_grow(kind: str, modality: str) -> None:
    pixels = pictures(1, 224)
    chosen = SHIFTS.load(kind)(modality=modality)
    assert chosen.as_published
    assert chosen.table == modality
    for table in (chosen.published, getattr(chosen, "upward", {})):
        assert len(table.get(modality, ())) in (0, 5)
    near, hard = (far(kind, severity, pixels, modality=modality) for severity in (1, 5))
    assert near > 0
    assert near < hard or kind in UNEVEN


@pytest.mark.parametrize("kind", [kind for kind in SHIFTS.names if not SHIFTS.load(kind).color])
def test_one_channel_is_enough_but_for_stains(kind: str) -> None:
    pixels = pictures(2, channels=1)
    assert made(kind).shifted(pixels, np.arange(2), "x", 0).shape == pixels.shape


@pytest.mark.parametrize("kind", ["blur", "motion", "bias_field", "gamma", "window", "contrast"])
def test_a_strength_means_the_same_at_any_size(kind: str) -> None:
    small, large = pictures(8, 32), pictures(8, 128)
    assert far(kind, 3, large, strength="own") == pytest.approx(far(kind, 3, small, strength="own"), rel=0.3)


@pytest.mark.parametrize("severity", [1, 5])
def test_hairs_are_as_dark_at_any_size(severity: int) -> None:
    def darkness(side: int) -> float:
        white = np.ones((side, side, 1), np.float32)
        return float(np.mean([1 - made("hair", severity).on(white, np.random.default_rng(i)).mean() for i in range(12)]))

    at_224 = darkness(224)
    assert darkness(32) == pytest.approx(at_224, rel=0.1)
    assert darkness(512) == pytest.approx(at_224, rel=0.1)


def photograph() -> tuple[np.ndarray, Image.Image]:
    pixels = pictures(1, 224)[0]
    return pixels.astype(np.float32) / np.float32(255), Image.fromarray(pixels)


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((np.clip(found, 0, 1) - wanted) ** 2) + 1e-12))


@pytest.mark.parametrize(("severity", "up", "down"), [(1, 1.2, 0.8), (3, 1.4, 0.7), (5, 1.6, 0.6)])
def test_brightness_of_medmnist_is_pillows(severity: int, up: float, down: float) -> None:
    x, image = photograph()
    for direction, factor in (("up", up), ("down", down)):
        found = made("brightness", severity, modality="ct", direction=direction).on(x, np.random.default_rng(0))
        assert psnr(found, np.asarray(ImageEnhance.Brightness(image).enhance(factor)) / 255) > 45


@pytest.mark.parametrize(("severity", "up", "down"), [(1, 1.3, 0.8), (3, 1.6, 0.6), (5, 1.8, 0.5)])
def test_contrast_of_medmnist_is_pillows(severity: int, up: float, down: float) -> None:
    x, image = photograph()
    for direction, factor in (("up", up), ("down", down)):
        found = made("contrast", severity, modality="ct", direction=direction).on(x, np.random.default_rng(0))
        assert psnr(found, np.asarray(ImageEnhance.Contrast(image).enhance(factor)) / 255) > 45


def test_colors_of_imagenet_c_are_those_of_hsv() -> None:
    x = np.random.default_rng(0).random((6, 6, 3)).astype(np.float32)
    x[0, 0], x[0, 1], x[0, 2] = 0.4, 0, 1  # gray, black, white
    for severity, plus, (times, more) in ((1, 0.1, (0.3, 0)), (4, 0.4, (5, 0.1)), (5, 0.5, (20, 0.2))):
        brighter = made("brightness", severity).on(x, np.random.default_rng(0))
        stronger = made("saturate", severity).on(x, np.random.default_rng(0))
        for place in np.ndindex(6, 6):
            h, s, v = colorsys.rgb_to_hsv(*x[place].tolist())
            np.testing.assert_allclose(brighter[place], colorsys.hsv_to_rgb(h, s, min(v + plus, 1)), atol=1e-5)
            wanted = colorsys.hsv_to_rgb(h, min(max(s * times + more, 0), 1), v)
            np.testing.assert_allclose(stronger[place], wanted, atol=1e-5)


def test_contrast_of_imagenet_c_is_by_channel() -> None:
    x = np.random.default_rng(0).random((9, 9, 3)).astype(np.float32)
    for severity, c in zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05), strict=True):
        means = x.astype(float).mean((0, 1), keepdims=True)
        np.testing.assert_allclose(made("contrast", severity).on(x, np.random.default_rng(0)), (x - means) * c + means, atol=1e-5)


@pytest.mark.parametrize(("modality", "kernels"), [("ct", (11, 13, 15, 17, 21)), ("chest", (3, 5, 7, 9, 11))])
def test_blur_of_medmnist_is_torchvisions(modality: str, kernels: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).random((224, 224, 1)).astype(np.float32)  # noise: the hardest to blur alike
    for severity, kernel in zip(SEVERITIES, kernels, strict=True):
        wanted = gaussian_blur(torch.from_numpy(x).permute(2, 0, 1), kernel).permute(1, 2, 0).numpy()
        found = made("blur", severity, modality=modality).on(x, np.random.default_rng(0))
        assert psnr(found, wanted) > psnr(x, wanted) + 12


def test_motion_of_imagemagick_on_a_point() -> None:
    x = np.zeros((224, 224, 1), np.float32)
    x[112, 112] = 1
    found = made("motion", 2).on(x, np.random.default_rng(3))[..., 0].astype(float)
    rows, columns = np.mgrid[:224, :224]
    angle = np.random.default_rng(3).uniform(-np.pi / 4, np.pi / 4)
    weights = np.exp(-(np.arange(31) ** 2) / 50)
    mean = (np.arange(31) * weights).sum() / weights.sum()
    assert found.sum() == pytest.approx(1, rel=1e-3)
    assert ((112 - columns) * found).sum() == pytest.approx(mean * np.cos(angle), rel=0.02)
    assert ((112 - rows) * found).sum() == pytest.approx(mean * np.sin(angle), abs=0.02)


def test_noises_as_published() -> None:
    flat = np.full((300, 300, 1), 0.4, np.float32)
    for severity, share in zip(SEVERITIES, (0.01, 0.02, 0.03, 0.05, 0.08), strict=True):
        found = made("impulse", severity, modality="ct").on(flat, np.random.default_rng(0))
        assert (found == 1).mean() == pytest.approx(share / 2, rel=0.15)
        assert (found == 0).mean() == pytest.approx(share / 2, rel=0.15)
    for severity, s in zip(SEVERITIES, (0.15, 0.2, 0.35, 0.45, 0.6), strict=True):
        assert made("speckle", severity).on(flat, np.random.default_rng(0)).std() == pytest.approx(0.4 * s, rel=0.02)
    for severity, s in zip(SEVERITIES, (0.08, 0.12, 0.18, 0.26, 0.38), strict=True):
        assert made("noise", severity).on(flat, np.random.default_rng(0)).std() == pytest.approx(s, rel=0.02)


def test_zoom_blur_by_hand_on_a_line() -> None:
    """A step at a distance r from the center comes to lie at r f: so many of the zooms are beyond a place."""
    x = np.zeros((224, 224, 1), np.float32)
    x[:, 112 + 60 :] = 1
    found = made("zoom_blur", 1).on(x, np.random.default_rng(0))[112, :, 0]
    factors = [1, *np.arange(1, 1.11, 0.01)]
    for column in (165, 174, 176, 180, 200):
        wanted = np.mean([np.clip((column - 111.5) / f + 111.5 - 171, 0, 1) for f in factors])
        assert found[column] == pytest.approx(wanted, abs=1e-3)


def test_bubbles_and_corners_as_published() -> None:
    flat = np.full((224, 224, 1), 0.2, np.float32)
    tones = np.unique(made("bubbles", 5).on(flat, np.random.default_rng(0)))
    np.testing.assert_allclose(tones, [0.2 + 0.8 * cover / 255 for cover in (0, 100, 130)], rtol=1e-6)
    for severity, multiple in zip(SEVERITIES, (1.10, 1.05, 1.00, 0.90, 0.95), strict=True):
        left = (made("black_corner", severity).on(flat, np.random.default_rng(0)) > 0).mean()
        radius = int(112 * multiple)
        rows, columns = np.mgrid[-112:112, -112:112]
        assert left == ((rows**2 + columns**2) <= radius**2).mean()


def test_what_is_published_is_the_default_and_ours_an_option() -> None:
    assert made("noise", 1).amount == 0.08
    assert made("noise", 1, modality="ct").amount == 0.04
    assert made("noise", 5, strength="own").amount == 0.26
    assert made("brightness", 5).amount == 0.5
    assert made("brightness", 5, modality="ct", direction="down").amount == 0.6
    assert made("brightness", 5, modality="fundus", direction="up").amount == 0.5  # only darker images are published
    assert made("noise", 1, modality="oct").amount == 0.08  # nothing for it: ImageNet-C's
    assert made("hair", 2).amount == made("hair", 2, strength="own").amount == 3  # nothing is published
    assert made("impulse", 1, strength="own").amount == 0.03  # nothing is ours
    with pytest.raises(ValidationError, match="modality"):
        made("noise", modality="xray")
    stream = Corruption(families=("noise", "hair"), severities=(1,), strength="own", modality="ct")
    assert [one.amount for one in stream.conditions()] == [0.04, 1]
    assert Corruption(families=("noise",), severities=(1,), modality="chest").conditions()[0].amount == 0.04


def test_formulas_by_hand() -> None:
    rng = np.random.default_rng(0)
    x = rng.random((16, 16, 1)).astype(np.float32)
    np.testing.assert_allclose(Contrast(severity=2, strength="own").on(x, rng), x.mean() + 0.55 * (x - x.mean()), atol=1e-6)
    np.testing.assert_allclose(Window(severity=3, strength="own").on(x, rng), 1.9 * (x - 0.5) + 0.5, atol=1e-6)
    bent = Gamma(severity=3, strength="own").on(x, np.random.default_rng(1))
    assert min(abs(bent - x**1.9).max(), abs(bent - x ** (1 / 1.9)).max()) < 1e-6
    flat = np.full((200, 200, 1), 0.5, np.float32)
    assert (Noise(severity=4, strength="own").on(flat, rng) - 0.5).std() == pytest.approx(0.18, rel=0.02)
    counts = Shot(severity=2, strength="own").on(flat, rng)
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


def test_families_of_a_modality_are_those_of_medmnist_c() -> None:
    """medmnistc/corruptions/registry.py, CORRUPTIONS_DS: up and down are one family here, Gaussian blur is `blur`."""
    both, noises = {"brightness", "contrast"}, {"noise", "speckle", "impulse", "shot"}
    files = {"pixelate", "jpeg"}
    registry = {
        "pathology": files | both | {"defocus", "motion", "saturate", "stain_deposit", "bubbles"},
        "blood": files | both | {"defocus", "motion", "saturate", "stain_deposit", "bubbles"},
        "dermatoscope": files | both | noises | {"defocus", "motion", "zoom_blur", "black_corner", "characters"},
        "fundus": files | both | {"noise", "speckle", "defocus", "motion"},
        "tissue": files | both | {"impulse", "blur"},
        "oct": files | {"speckle", "defocus", "motion", "contrast"},
        "ultrasound": files | both | {"speckle", "motion"},
        "chest": files | both | noises | {"blur", "gamma"},
        "pneumonia": files | both | noises | {"blur", "gamma"},
        "ct": files | both | noises | {"blur", "gamma"},
    }
    assert {modality: set(published_for(modality)) for modality in registry} == registry  # type: ignore[arg-type]
    stream = Corruption.model_validate({"families": "published", "modality": "ct", "severities": [2]})
    assert [shift.kind() for shift in stream.conditions()] == sorted(registry["ct"])
