"""Images on which methods disagree: how they are chosen, and that none is shown without the target's grant."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedmerge.report.metrics.disagreement import most_apart, vote_entropy, votes
from fedmerge.report.pages.run import disputed_images, render
from fedmerge.report.plots.run import draw
from fedmerge.report.records import Disputed, RunRecord
from fedmerge.report.summary import summarize

VOTES = arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=st.integers(0, 3))


@given(VOTES)
def test_apart_is_the_entropy_of_the_votes(said: np.ndarray) -> None:
    for found, column in zip(vote_entropy(said), said.T, strict=True):
        shares = np.unique(column, return_counts=True)[1] / len(column)
        assert math.isclose(found, max(0.0, -sum(p * math.log(p) for p in shares)), abs_tol=1e-9)


@given(VOTES, st.integers(0, 12))
def test_the_furthest_apart_are_taken_and_never_one_on_which_all_agree(said: np.ndarray, count: int) -> None:
    score, places = vote_entropy(said), most_apart(said, count)
    assert len(places) == min(count, (score > 0).sum())
    assert (np.diff(places) > 0).all()
    assert (score[places] > 0).all()
    others = np.setdiff1d(np.arange(said.shape[1]), places)
    if len(places) and len(others):
        assert score[places].min() >= score[others].max() or count > len(places)


def test_equal_ones_lie_along_the_stream() -> None:
    said = np.array([[0] * 100, [1] * 100])
    assert most_apart(said, 3).tolist() == [0, 50, 99]


def test_single_experts_and_rows_of_a_part_have_no_vote() -> None:
    p = {"mean": np.eye(2, dtype=np.float32), "expert:north": np.eye(2, dtype=np.float32), "late": np.eye(2, dtype=np.float32)[:1]}
    names, said = votes(p, 2, p.__getitem__)
    assert names == ["mean"]
    assert said.tolist() == [[0, 1]]
    assert votes([], 2, p.__getitem__)[1].shape == (0, 2)


def page(record: RunRecord) -> str:
    summary = summarize(record)
    return render(record, summary, draw(record, summary))


def test_the_report_counts_them_and_shows_what_is_granted(record: RunRecord) -> None:
    ranked = ["mean", "eam", "ensemble"]
    _, said = votes(ranked, 200, record.probabilities)
    places = most_apart(said, 2)
    without = disputed_images(record, ranked)
    assert without["count"] == int((said != said[0]).any(0).sum())
    assert without["shown"] == []
    assert "The target shows none of them" in page(record)
    shown = replace(record, disputed=Disputed(tuple(places.tolist()), np.full((2, 8, 8, 1), 7, np.uint8)))
    one, _ = disputed_images(shown, ranked)["shown"]
    y = np.concatenate(record.labels)
    assert one["true"] == record.classes[y[places[0]]]
    assert one["batch"] == places[0] // 10
    assert sorted(name for _, who, _ in one["answers"] for name in who) == sorted(ranked)
    for answer, who, right in one["answers"]:
        assert right == (answer == one["true"])
        assert all(record.classes[said[ranked.index(name), places[0]]] == answer for name in who)
    text = page(shown)
    assert text.count('src="data:image/png') == page(record).count('src="data:image/png') + 2
    assert f'alt="image {places[0]} of the stream"' in text
