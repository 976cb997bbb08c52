"""The phantom: deterministic, no patient in two places, priors as they were asked for, and quick."""

from __future__ import annotations

import time

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import chisquare

from fedmerge.data.datasets._base import Geometry
from fedmerge.data.datasets.organ_phantom import ORGANS, OrganPhantom
from fedmerge.data.images import Images
from fedmerge.data.partition import holdout
from fedmerge.rng import generator

GEOMETRY = Geometry(16, 1)


def phantom(owner: str = "north", seed: int = 0, **fields: object) -> Images:
    return OrganPhantom.model_validate({"images": 200, "patients": 40, **fields}).load(GEOMETRY, owner, seed)


def test_the_same_seed_and_owner_give_the_same_images(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    first = phantom()
    monkeypatch.setenv("FEDMERGE_CACHE", f"{tmp_path}/other")  # rendered again, not read again
    again = phantom()
    assert np.array_equal(first.pixels, again.pixels)
    assert np.array_equal(first.labels, again.labels)


def test_another_owner_or_seed_has_other_patients() -> None:
    first = phantom().pixels
    for other in (phantom("south").pixels, phantom(seed=1).pixels):
        assert not (first[:, None] == other[None, :50]).all((2, 3, 4)).any()


def test_no_patient_is_on_both_sides_of_a_split() -> None:
    images = phantom()
    train, held = holdout(images.labels, images.groups, 0.2, generator(0, "x"))
    assert not set(images.groups[train]) & set(images.groups[held])
    assert len(train) + len(held) == len(images)
    assert len(set(images.groups.tolist())) == 40


def test_priors_are_respected() -> None:
    images = phantom(images=4000, patients=400, priors={"liver": 4, "heart": 0})
    counts = np.bincount(images.labels, minlength=len(ORGANS))
    weights = np.array([{"liver": 4.0, "heart": 0.0}.get(organ, 1.0) for organ in ORGANS])
    drawn = weights > 0
    assert counts[ORGANS.index("heart")] == 0
    assert chisquare(counts[drawn], 4000 * weights[drawn] / weights.sum()).pvalue > 1e-3


def test_images_are_hounsfield_units_of_eleven_organs_without_flips() -> None:
    images = phantom(images=600)
    assert images.pixels.shape == (600, 16, 16, 1)
    assert images.pixels.dtype == np.int16
    assert -1100 <= images.pixels.min() < -700
    assert 300 < images.pixels.max() < 1200
    assert images.classes == ORGANS == tuple(sorted(ORGANS))
    assert len(ORGANS) == 11
    assert not images.flips
    assert np.bincount(images.domains).tolist() == [200, 200, 200]


def test_an_organ_looks_like_itself_in_its_plane() -> None:
    """Lungs are dark in the middle of their crop, bones bright."""
    images = phantom(images=600)
    middle = images.pixels[:, 7:9, 7:9, 0].mean((1, 2))
    means = {organ: middle[images.labels == number].mean() for number, organ in enumerate(ORGANS)}
    assert means["lung-left"] < -500 > means["lung-right"]
    assert means["femur-left"] > 250 < means["femur-right"]
    assert -50 < means["bladder"] < means["liver"]


def test_color_is_gray_repeated() -> None:
    colored = OrganPhantom(images=20, patients=4).load(Geometry(16, 3), "x", 0).pixels
    assert np.array_equal(colored[..., 0], colored[..., 2])


def test_five_thousand_images_take_seconds() -> None:
    began = time.process_time()  # of this process alone, whatever else runs
    OrganPhantom(images=5000, patients=500).load(Geometry(32, 1), "speed", 0)
    assert time.process_time() - began < 15


@pytest.mark.parametrize(
    "bad", [{"priors": {"livre": 2}}, {"planes": ["axial", "axial"]}, {"planes": ["oblique"]}, {"images": 0}, {"crop": 0.5}]
)
def test_what_cannot_be_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        OrganPhantom.model_validate(bad)
