"""Streams: nothing twice, nothing lost unless it says so, and the mix is the one that was asked for."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedmerge.data.corrupted_images import Gallery
from fedmerge.data.images import Images
from fedmerge.errors import DataError
from fedmerge.stream.schedules._base import SCHEDULES
from fedmerge.stream.schedules.dirichlet_batch import DirichletBatch
from fedmerge.stream.schedules.iid import Iid
from fedmerge.stream.schedules.mixture_drift import MixtureDrift
from fedmerge.stream.schedules.note import Note
from fedmerge.stream.stream import Stream


def some_images(n: int, classes: int = 4, domains: int = 2) -> Images:
    index = np.arange(n)
    return Images(
        pixels=np.zeros((n, 2, 2, 1), np.uint8),
        labels=index % classes,
        domains=(index // classes) % domains,
        groups=index,
        classes=tuple("abcdefgh"[:classes]),
        domain_names=tuple("uvwxyz"[:domains]),
        flips=False,
    )


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SCHEDULES.names), st.integers(40, 200), st.integers(1, 24), st.integers(0, 5), st.integers(2, 4))
def test_no_image_comes_twice(kind: str, n: int, size: int, seed: int, domains: int) -> None:
    schedule = SCHEDULES.load(kind)() if kind == "single" else SCHEDULES.load(kind)(batch_size=size)
    size = schedule.batch_size
    images = Gallery(some_images(n, domains=domains), schedule.conditions(), "x", seed)
    n = len(images)
    try:
        stream = Stream(images, schedule, "x", seed)
    except DataError:
        assert kind == "mixture_drift"
        return
    flat = np.concatenate(stream.batches)
    assert len(set(flat.tolist())) == len(flat) == stream.samples == n - stream.unused
    assert flat.min() >= 0
    assert flat.max() < n
    if kind not in ("domain_seq", "corruption"):  # there each domain, or condition, has its last batch
        assert all(len(batch) == size for batch in stream.batches[:-1])
    assert 1 <= len(stream.batches[-1]) <= size
    if kind != "mixture_drift":
        assert stream.unused == 0
    np.testing.assert_allclose(stream.truth.sum(1), 1)
    assert stream.index_sha256 == Stream(images, schedule, "x", seed).index_sha256


def test_a_seed_makes_another_stream() -> None:
    images = some_images(100)
    assert Stream(images, Iid(), "x", 0).index_sha256 != Stream(images, Iid(), "x", 1).index_sha256


def test_the_digest_is_the_same_in_another_process() -> None:
    code = (
        "from tests.unit.stream.test_schedules import some_images; from fedmerge.stream.stream import Stream;"
        "from fedmerge.stream.schedules.dirichlet_batch import DirichletBatch;"
        "print(Stream(some_images(100), DirichletBatch(), 'x', 3).index_sha256)"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == Stream(some_images(100), DirichletBatch(), "x", 3).index_sha256


def largest_class(delta: float) -> float:
    images = some_images(2000, classes=4)
    batches = Stream(images, DirichletBatch(delta=delta), "x", 0).batches
    return float(np.mean([np.bincount(images.labels[b]).max() for b in batches[: len(batches) // 2]]))


def test_a_small_delta_means_few_classes_per_batch() -> None:
    assert largest_class(0.01) > 28
    assert largest_class(0.01) > largest_class(0.5) > largest_class(100)
    assert largest_class(100) < 16


def test_a_tiny_delta_is_guarded() -> None:
    assert Stream(some_images(64), DirichletBatch(delta=1e-300), "x", 0).samples == 64


@pytest.mark.parametrize("domains", [2, 3, 4])
def test_a_smooth_drift_goes_from_the_first_domain_to_the_last(domains: int) -> None:
    mixture = MixtureDrift().mixture(101, domains)
    np.testing.assert_allclose(mixture.sum(1), 1)
    assert mixture[0].tolist() == pytest.approx(np.eye(domains)[0])
    assert mixture[-1].tolist() == pytest.approx(np.eye(domains)[-1])
    if domains == 2:
        assert mixture[50].tolist() == pytest.approx([0.5, 0.5])
    else:
        assert mixture[:, 1].argmax() == round(100 / (domains - 1))


def test_an_abrupt_drift_has_equal_segments() -> None:
    mixture = MixtureDrift(drift="abrupt").mixture(9, 3)
    assert mixture.argmax(1).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert set(mixture.ravel()) == {0, 1}
    soft = MixtureDrift(drift="abrupt", purity=0.9).mixture(9, 3)
    np.testing.assert_allclose(soft[0], [0.9, 0.05, 0.05])


def test_the_stream_follows_the_mixture() -> None:
    images = some_images(4000, domains=2)
    stream = Stream(images, MixtureDrift(), "x", 0)
    planned = MixtureDrift().length([2000, 2000])
    assert planned == 125  # floor(2000 / (32 * 0.5))
    assert 0.75 * planned < len(stream) <= planned  # a domain may run dry while its share is already small
    assert abs(stream.truth - MixtureDrift().mixture(planned, 2)[: len(stream)]).mean() < 0.06


def test_a_stream_stops_when_a_domain_runs_dry() -> None:
    images = some_images(64, domains=2)  # 32 images of each domain for 2 batches of 32: chance decides
    lengths = {len(Stream(images, MixtureDrift(drift="abrupt", purity=0.5), "x", seed)) for seed in range(60)}
    assert lengths == {1, 2}


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["abrupt", "recurring", "gradual_severity"]), st.lists(st.integers(40, 700), min_size=2, max_size=5))
def test_a_drift_with_segments_ends_as_planned(drift: str, sizes: list[int]) -> None:
    """Two domains of 600 were 19 batches of the first, of which it has images for 18, and not one of the second."""
    schedule = MixtureDrift(drift=drift)  # type: ignore[arg-type]
    domains, T = np.repeat(np.arange(len(sizes)), sizes), schedule.length(sizes)
    batches = schedule.batches(np.zeros_like(domains), domains, np.random.default_rng(0))
    assert len(batches) == T
    assert [set(domains[batch].tolist()) for batch in batches] == [{m} for m in schedule.mixture(T, len(sizes)).argmax(1).tolist()]


def test_a_drift_needs_two_domains() -> None:
    (problem,) = MixtureDrift().check(("axial",))
    assert "one domain" in problem.found
    assert MixtureDrift().check(("axial", "coronal")) == []


def test_too_few_images_for_one_batch() -> None:
    with pytest.raises(DataError, match="makes no batch"):
        Stream(some_images(20), MixtureDrift(batch_size=32), "mercy", 0)


def test_the_answer_sheet_marks_and_opens() -> None:
    images = some_images(50)
    stream = Stream(images, Iid(batch_size=16), "x", 0)
    sure = np.eye(4, dtype=np.float32)[images.labels[stream.batches[1]]]
    assert stream.mark(1, sure) == 16
    assert stream.mark(1, np.roll(sure, 1, axis=1)) == 0
    answers = stream.answers()
    assert [len(batch) for batch in answers.labels] == [16, 16, 16, 2]
    assert np.array_equal(np.concatenate(answers.domains), images.domains[np.concatenate(stream.batches)])


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"max_batches": 0}])
def test_sizes_are_checked(bad: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Iid(**bad)
    with pytest.raises(ValidationError):
        DirichletBatch(delta=0)


def largest(schedule: object, images: Images, seed: int = 0) -> float:
    """Mean count of the most frequent class in a batch."""
    stream = Stream(images, schedule, "x", seed)  # type: ignore[arg-type]
    return float(np.mean([np.bincount(images.labels[batch]).max() for batch in stream.batches if len(batch) == 32]))


def test_note_does_not_feel_delta_with_two_classes() -> None:
    """METHODS.md 7: 31.0 to 31.4 of 32 at every delta from 0.001 to 10, of 600 samples."""
    images = some_images(600, classes=2)
    found = [np.mean([largest(Note(delta=delta), images, seed) for seed in range(5)]) for delta in (1e-3, 0.1, 1, 10)]
    assert all(30.5 < value < 31.7 for value in found), found


def test_the_29_of_32_of_the_papers() -> None:
    """METHODS.md 7: with 7 classes, Dirichlet batches of delta 0.01 and NOTE's order of about 0.4 both give 29 of 32."""
    labels = np.repeat(np.arange(7), [379, 255, 180, 135, 199, 288, 449])  # PACS, art painting: sizes of its classes
    images = some_images(len(labels), classes=7)
    images = Images(**{**vars(images), "labels": labels.astype(np.int64)})
    batches = np.mean([largest(DirichletBatch(delta=0.01), images, seed) for seed in range(3)])
    note = np.mean([largest(Note(delta=0.4), images, seed) for seed in range(3)])
    assert 28 < batches < 30.5
    assert 27.5 < note < 30.5


def test_temporal_orders() -> None:
    images = some_images(400, classes=4)
    temporal = SCHEDULES.load("temporal")
    labels = images.labels[np.concatenate(Stream(images, temporal(order="sorted"), "x", 0).batches)]
    assert (np.diff(labels) >= 0).all()
    chain = images.labels[np.concatenate(Stream(images, temporal(order="markov", stay=0.9), "x", 0).batches)]
    stays = float((np.diff(chain) == 0).mean())
    assert abs(stays - (0.9 + 0.1 / 4)) < 0.05
    free = images.labels[np.concatenate(Stream(images, temporal(order="markov", stay=0), "x", 0).batches)]
    assert abs(float((np.diff(free) == 0).mean()) - 0.25) < 0.08
    same = Stream(images, temporal(order="note", delta=0.2), "x", 0).batches
    assert sorted(np.concatenate(same).tolist()) == list(range(400))


def test_domains_one_after_another_with_labels_in_any_order() -> None:
    images = some_images(300, domains=3)
    schedule = SCHEDULES.load("domain_seq").model_validate(
        {"kind": "domain_seq", "within": {"kind": "temporal", "order": "sorted"}}
    )
    stream = Stream(images, schedule, "x", 0)
    order = np.concatenate(stream.batches)
    assert (np.diff(images.domains[order]) >= 0).all()
    assert stream.unused == 0
    assert all(len(np.unique(images.domains[batch])) == 1 for batch in stream.batches)
    for domain in range(3):
        assert (np.diff(images.labels[order[images.domains[order] == domain]]) >= 0).all()
    again = SCHEDULES.load("domain_seq").model_validate(schedule.model_dump(mode="json"))
    assert again == schedule
    drawn = {Stream(images, SCHEDULES.load("domain_seq")(order="random"), "x", seed).truth[0].argmax() for seed in range(12)}
    assert len(drawn) > 1


def test_mixed_domains_and_single_keep_the_inner_order() -> None:
    images = some_images(120, domains=3)
    mixed = SCHEDULES.load("mixed_domains")(within={"kind": "temporal", "order": "sorted"})
    assert (np.diff(images.labels[np.concatenate(Stream(images, mixed, "x", 0).batches)]) >= 0).all()
    single = Stream(images, SCHEDULES.load("single")(of=mixed), "x", 0)
    assert [len(batch) for batch in single.batches] == [1] * 120
    assert (np.diff(images.labels[np.concatenate(single.batches)]) >= 0).all()
    nested = SCHEDULES.load("mixed_domains")(within="mixture_drift")
    (problem,) = nested.check(("u", "v"))
    assert problem.key == "within.kind"


@pytest.mark.parametrize("wrong", ["temporl", {"kind": "iidd"}, {"stay": 0.5}, {"kind": "temporal", "stay": 1.5}, 3])
def test_a_wrong_inner_schedule_is_told(wrong: object) -> None:
    with pytest.raises(ValidationError) as error:
        SCHEDULES.load("domain_seq").model_validate({"within": wrong})
    assert error.value.errors()[0]["loc"][0] == "within"


def test_drifts_that_come_back_rise_and_fall_or_jump() -> None:
    recurring = MixtureDrift(drift="recurring", cycles=2).mixture(12, 3).argmax(1)
    assert recurring.tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]
    severity = MixtureDrift(drift="gradual_severity").mixture(9, 5).argmax(1)
    assert severity.tolist() == [0, 1, 2, 3, 4, 3, 2, 1, 0]
    images = some_images(2000, domains=4)
    stream = Stream(images, MixtureDrift(drift="random"), "x", 0)
    assert len(stream) > 10
    np.testing.assert_allclose(stream.truth.mean(0), 0.25, atol=0.12)
    assert stream.truth.max(1).mean() > 0.5  # Dir(0.5) is uneven


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["abrupt", "recurring", "gradual_severity", "random", "smooth"]), st.integers(2, 6), st.integers(1, 50))
def test_every_mixture_sums_to_one(drift: str, domains: int, length: int) -> None:
    pi = MixtureDrift(drift=drift).mixture(length, domains)  # type: ignore[arg-type]
    assert pi.shape == (length, domains)
    np.testing.assert_allclose(pi.sum(1), 1)
    assert (pi >= 0).all()


def corrupted(n: int, **keys: Any) -> tuple[Gallery, Stream]:
    schedule = SCHEDULES.load("corruption")(batch_size=8, **keys)
    gallery = Gallery(some_images(n), schedule.conditions(), "x", 0)
    return gallery, Stream(gallery, schedule, "x", 0)


@pytest.mark.parametrize("within", ["domain_seq", "iid", {"kind": "temporal"}])
def test_corruption_shows_each_image_once_per_family_and_severity(within: Any) -> None:
    gallery, stream = corrupted(24, families=("noise", "jpeg"), severities=(1, 3, 5), within=within)
    index = np.concatenate(stream.batches)
    assert sorted(index.tolist()) == list(range(6 * 24))
    assert gallery.domain_names == ("noise 1", "noise 3", "noise 5", "jpeg 1", "jpeg 3", "jpeg 5")
    assert stream.truth.shape[1] == 6


def test_corruption_of_some_images_takes_the_same_under_all_conditions() -> None:
    _, stream = corrupted(40, families=("noise",), severities=(2, 4), images=16)
    index = np.concatenate(stream.batches)
    first, second = np.sort(index[index < 40]), np.sort(index[index >= 40]) - 40
    assert len(first) == 16
    assert np.array_equal(first, second)


def test_corruption_of_more_images_than_there_are() -> None:
    with pytest.raises(DataError, match="found 41; expected at most 40"):
        corrupted(40, images=41)


def test_corruption_in_sequence_goes_through_conditions_one_by_one() -> None:
    _, stream = corrupted(16, families=("noise", "gamma"), severities=(1, 2))
    assert stream.truth.argmax(1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert set(stream.truth.ravel()) == {0, 1}


def test_corruption_may_grow_and_fall_again() -> None:
    within = {"kind": "mixture_drift", "drift": "gradual_severity"}
    _, stream = corrupted(80, families=("noise",), within=within)
    level = stream.truth @ np.arange(1, 6)
    top = int(level.argmax())
    assert 0 < top < len(level) - 1
    assert level[0] < level[top] > level[-1]


@pytest.mark.parametrize("outer", ["domain_seq", "mixed_domains", "corruption"])
def test_corruption_is_not_held_by_another_schedule(outer: str) -> None:
    problems = SCHEDULES.load(outer)(within={"kind": "corruption"}).check(("u", "v"))
    assert [problem.key for problem in problems] == ["within"]
    assert "corruption" in problems[0].found


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"families": ["nois"]}, "noise"),
        ({"families": ["noise", "noise"]}, "each family once"),
        ({"families": []}, "at least 1"),
        ({"severities": [0]}, "greater than or equal to 1"),
        ({"severities": [6]}, "less than or equal to 5"),
        ({"severities": [2, 2]}, "each value once"),
        ({"images": 0}, "greater than or equal to 1"),
    ],
)
def test_what_corruption_refuses(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        SCHEDULES.load("corruption")(**keys)
