"""Splits: nothing lost, nothing twice, no patient on both sides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedmerge.data.partition import Split, holdout
from fedmerge.rng import generator

few = settings(max_examples=40, deadline=None)


@st.composite
def populations(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    n, patients = draw(st.integers(2, 120)), draw(st.integers(2, 40))
    groups = rng.integers(patients, size=n)
    groups[:2] = 0, 1
    return rng.integers(draw(st.integers(1, 6)), size=n), groups


@few
@given(populations(), st.floats(0.05, 0.95), st.integers(0, 99))
def test_holdout_covers_everything_and_never_splits_a_group(
    population: tuple[np.ndarray, np.ndarray], share: float, seed: int
) -> None:
    labels, groups = population
    train, held = holdout(labels, groups, share, generator(seed, "t"))
    assert sorted([*train, *held]) == list(range(len(labels)))
    assert len(train) and len(held)
    assert not set(groups[train]) & set(groups[held])
    again = holdout(labels, groups, share, generator(seed, "t"))
    assert np.array_equal(train, again[0]) and np.array_equal(held, again[1])


@few
@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), st.floats(0.02, 0.98), st.integers(0, 99))
def test_every_class_is_on_both_sides_when_images_are_groups_of_their_own(sizes: list[int], share: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    train, held = holdout(labels, np.arange(len(labels)), share, generator(seed, "t"))
    assert set(labels[train]) == set(labels[held]) == set(range(len(sizes)))


def test_holdout_keeps_the_shares_of_classes() -> None:
    rng = generator(0, "t")
    labels, groups = rng.choice(5, 4000, p=[0.4, 0.3, 0.15, 0.1, 0.05]), rng.integers(500, size=4000)
    _, held = holdout(labels, groups, 0.2, rng)
    shares = np.bincount(labels[held], minlength=5) / np.bincount(labels)
    assert np.abs(shares - 0.2).max() < 0.02


def test_a_rare_class_of_two_patients_is_put_on_both_sides() -> None:
    groups = np.repeat(np.arange(50), 4)
    labels = np.zeros(200, np.int64)
    labels[[0, 4]] = 1  # patients 0 and 1 have one image each
    for seed in range(20):
        train, held = holdout(labels, groups, 0.1, generator(seed, "t"))
        assert 1 in labels[train] and 1 in labels[held]


def test_one_patient_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="one group"):
        holdout(np.array([0, 1]), np.array([7, 7]), 0.2, generator(0, "t"))


specs = st.one_of(
    st.builds(
        lambda by, parts, alpha, seed: {"by": by, "parts": parts, "alpha": alpha, "seed": seed},
        st.sampled_from(["label_skew", "quantity_skew"]),
        st.integers(2, 6),
        st.sampled_from([0.01, 0.1, 1.0, 100.0]),
        st.integers(0, 99),
    ),
    st.builds(
        lambda shares, seed: {"by": "quantity", "parts": len(shares), "shares": shares, "seed": seed},
        st.lists(st.floats(0.01, 10), min_size=2, max_size=6),
        st.integers(0, 99),
    ),
)


@few
@given(specs, st.lists(st.integers(0, 4), max_size=150))
def test_parts_are_disjoint_and_cover_everything(spec: dict[str, object], labels: list[int]) -> None:
    y = np.array(labels, np.int64)
    parts = [Split.model_validate({**spec, "part": part}).indices(y, "d") for part in range(int(str(spec["parts"])))]
    assert sorted(np.concatenate(parts)) == list(range(len(y)))
    assert all(np.array_equal(part, np.sort(part)) and part.dtype == np.int64 for part in parts)


def test_quantity_gives_every_class_the_asked_shares() -> None:
    y = np.repeat([0, 1, 2], [100, 200, 50])
    for part, share in enumerate((0.7, 0.2, 0.1)):
        mine = Split(by="quantity", parts=3, shares=(0.7, 0.2, 0.1), part=part).indices(y, "d")
        assert np.abs(np.bincount(y[mine]) - share * np.array([100, 200, 50])).max() <= 1


def test_label_skew_is_stronger_for_a_small_alpha() -> None:
    y = np.repeat(np.arange(5), 400)

    def unevenness(alpha: float) -> float:
        parts = [Split(by="label_skew", parts=4, part=p, alpha=alpha).indices(y, "d") for p in range(4)]
        shares = np.stack([np.bincount(y[part], minlength=5) / 400 for part in parts])
        return float(shares.std(0).mean())

    assert unevenness(0.1) > 2 * unevenness(10.0)


def test_a_domain_is_split_by_its_own_name() -> None:
    y = np.repeat([0, 1], 200)
    split = Split(by="quantity", parts=2, shares=(1, 1), part=0)
    assert not np.array_equal(split.indices(y, "tecom"), split.indices(y, "cellavision"))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"by": "label_skew", "part": 2}, "count from 0"),
        ({"by": "quantity", "part": 0}, "0 shares for 2 parts"),
        ({"by": "quantity", "part": 0, "shares": [1, -1]}, "greater than 0"),
        ({"by": "quantity", "part": 0, "shares": [1, float("nan")]}, "finite number"),
        ({"by": "label_skew", "part": 0, "shares": [1, 1]}, "draws them"),
        ({"by": "label_skew", "part": 0, "alpha": 0}, "greater than or equal"),
    ],
)
def test_impossible_splits_are_refused(spec: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Split.model_validate(spec)
