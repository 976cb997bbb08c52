"""Plots of many batches, sites and experts say what they say of few."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.report.metrics.segments import MOST, segments
from fedmerge.report.metrics.significance import DRAWS, _sums, block_length
from fedmerge.report.plots.layout import MOST_EXPERTS, MOST_POINTS, MOST_SHARES, apart, binned, largest, named, points
from fedmerge.report.plots.run import coefficients, running
from fedmerge.report.records import RunRecord
from fedmerge.report.summary import summarize


@given(st.integers(1, 5000), st.integers(1, 12))
def test_shares_stay_shares(batches: int, sites: int) -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(sites), batches)
    at, means = binned(shares)
    few, names = largest(means, [f"s{k}" for k in range(sites)])
    assert len(at) == len(means) == min(batches, MOST_POINTS)
    assert len(names) == few.shape[1] <= MOST_SHARES
    np.testing.assert_allclose(few.sum(1), 1)
    assert (np.diff(at) > 0).all()
    np.testing.assert_array_equal(points(batches)[[0, -1]], [0, batches - 1])


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12, unique=True), st.integers(1, 60))
def test_names_are_moved_apart_and_no_further(values: list[int], gap: int) -> None:
    """In the order of their values, never below them; above them only as far as the one beneath makes necessary."""
    given_ = {str(value): float(value) for value in values}
    places = apart(given_, gap)
    names = sorted(given_, key=lambda name: given_[name])
    assert list(places) == names
    for below, name in zip([None, *names], names, strict=False):
        assert places[name] == max(given_[name], places[below] + gap if below else 0)


def test_a_bin_is_the_mean_of_its_batches() -> None:
    shares = np.arange(3 * MOST_POINTS, dtype=float)[:, None]
    at, means = binned(shares)
    np.testing.assert_allclose(at, means[:, 0])
    np.testing.assert_allclose(means[:, 0], 1 + 3 * np.arange(MOST_POINTS))


def test_of_many_experts_the_best_is_named() -> None:
    rows = {f"expert:{k}": {"accuracy": k / 100} for k in range(MOST_EXPERTS + 1)} | {"mean": {"accuracy": 0.0}}
    assert named(rows) == [f"expert:{MOST_EXPERTS}", "mean"]
    del rows["expert:0"]
    assert named(rows) == list(rows)


def test_the_bootstrap_sums_whole_blocks_around_the_circle() -> None:
    """Against the draws written out as indices."""
    for batches in (1, 2, 7, 20, 100):
        values = np.random.default_rng(1).integers(0, 9, batches)
        length = block_length(batches)
        starts = np.random.Generator(np.random.PCG64(5)).integers(batches, size=(DRAWS, -(-batches // length)))
        drawn = ((starts[..., None] + np.arange(length)) % batches).reshape(DRAWS, -1)[:, :batches]
        np.testing.assert_array_equal(_sums((values,), 5)[0], values[drawn].sum(1))


def test_a_stream_that_changes_with_every_batch_has_no_segments() -> None:
    truth = np.eye(2)[np.arange(MOST + 1) % 2]
    ones = np.ones(MOST + 1, np.int64)
    assert segments(truth, ones, ones) == []
    assert len(segments(truth[:MOST], ones[:MOST], ones[:MOST])) == MOST


def test_lines_have_no_more_points_than_can_be_seen(record: RunRecord) -> None:
    times = 40
    assert isinstance(record.steps, list)
    steps = [replace(step, t=step.t + 20 * i) for i in range(times) for step in record.steps]
    stream = replace(record.stream, batches=20 * times, truth=np.tile(record.stream.truth, (times, 1)))
    long = replace(record, steps=steps, stream=stream, labels=record.labels * times, domains=record.domains * times)
    summary = summarize(long)
    assert all(len(line.get_xdata()) == MOST_POINTS for line in running(long, summary).axes[0].lines)
    stacks = [path for axes in coefficients(long, "eam").axes for one in axes.collections for path in one.get_paths()]
    assert stacks
    assert all(len(path.vertices) < 3 * MOST_POINTS for path in stacks)
