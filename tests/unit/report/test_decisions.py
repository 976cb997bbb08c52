"""What choices between models had to go by, from predictions alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fedmerge.report.metrics.decisions import by_who, entropies, kept_rows, quadrants, signals
from fedmerge.report.pages.diagnosis import kept_coefficients

P = {
    "a": np.array([[1, 0], [0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], np.float32),
    "b": np.array([[0, 1], [0.6, 0.4], [0.9, 0.1], [0.3, 0.7]], np.float32),
}
Y = np.array([0, 0, 1, 0])


def entropy_of(*p: float) -> float:
    return -sum(q * math.log(q) for q in p if q)


def test_signals_of_two_models() -> None:
    (one,) = signals(P, Y)
    assert one.pair == ("a", "b")
    assert one.apart[0] == pytest.approx(1, abs=1e-4)  # each is sure of another class
    assert one.apart[1] == pytest.approx(
        (entropy_of(0.75, 0.25) - (entropy_of(0.9, 0.1) + entropy_of(0.6, 0.4)) / 2) / math.log(2), abs=1e-6
    )
    assert one.share[2] == pytest.approx(
        math.exp(-entropy_of(0.5, 0.5)) / (math.exp(-entropy_of(0.5, 0.5)) + math.exp(-entropy_of(0.9, 0.1))), abs=1e-6
    )
    assert one.unsure[3] == pytest.approx((entropy_of(0.2, 0.8) + entropy_of(0.3, 0.7)) / 2 / math.log(2), abs=1e-6)
    assert one.stake[1] == pytest.approx(math.log(0.9 / 0.6), abs=1e-6)
    assert one.right.tolist() == [[True, False, True], [True, True, True], [False, False, False], [False, False, False]]


def test_images_by_who_is_right() -> None:
    (one,) = signals(P, Y)
    rows = {row["who"]: row for row in by_who(one)}
    assert list(rows) == ["TrueTrue", "TrueFalse", "FalseTrue", "FalseFalse"]
    assert [row["samples"] for row in rows.values()] == [1, 1, 0, 2]
    assert rows["TrueTrue"]["entropy_loss"] is None and rows["FalseTrue"]["share"] is None
    assert abs(rows["FalseFalse"]["entropy_loss"]) == pytest.approx(1)  # of two images


def test_quadrants_hold_every_image_once() -> None:
    rng = np.random.default_rng(0)
    p = {name: rng.dirichlet(np.ones(3), 101).astype(np.float32) for name in "ab"}
    y = rng.integers(3, size=101)
    rows = quadrants(signals(p, y)[0])
    assert sum(row["samples"] for row in rows) == 101
    assert sum(row["samples"] for row in rows if row["sure"]) == 51
    assert sum(row["samples"] * row["first"] for row in rows) == pytest.approx((p["a"].argmax(1) == y).sum())
    together = [row for row in rows if row["agree"]]
    assert all(row["first"] == row["second"] == row["average"] for row in together)


def test_entropies_leave_out_images_without_a_prediction() -> None:
    gone = P["a"].copy()
    gone[0] = np.nan
    rows = entropies({"m": gone, "expert:b": P["b"], "none": np.full((4, 2), np.nan, np.float32)}, Y, frozenset({"expert:b"}))
    found = {row["row"]: row for row in rows}
    assert list(found) == ["expert:b", "m"] and found["expert:b"]["single"] and not found["m"]["single"]
    assert found["m"]["entropy"] == pytest.approx(
        (entropy_of(0.9, 0.1) + entropy_of(0.5, 0.5) + entropy_of(0.2, 0.8)) / 3, abs=1e-4
    )
    assert found["m"]["right"] == pytest.approx(entropy_of(0.9, 0.1), abs=1e-4)


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ({}, ["all"] * 4),
        ({"classes": {"novel": ["liver"]}}, ["base", "base", "novel", "base"]),
        ({"per_family": {"fog": 0.5, "blur": 0.5}}, ["fog", "fog", "blur", "blur"]),
    ],
)
def test_settings_of_images(tmp_path: Path, summary: dict[str, dict[str, list[str]]], expected: list[str]) -> None:
    families = summary.get("per_family")
    row = {
        "covers": None,
        "per_class": {"heart": 1, "liver": 0},
        "per_domain": {"fog 1": 1, "fog 2": 1, "blur 1": 1} if families else {"axial": 1},
        "per_family": families or {},
    }
    domains = [0, 1, 2, 2] if families else [0] * 4
    np.savez(tmp_path / "predictions.npz", labels=Y, domains=np.array(domains), **{"p:m": P["a"]})
    (tmp_path / "summary.json").write_text(json.dumps({"methods": {"m": row}, **summary}))
    rows, y, settings = kept_rows(tmp_path)
    assert list(rows) == ["m"] and y.tolist() == Y.tolist()
    assert settings.tolist() == expected


def test_coefficients_of_a_method_that_needs_theta_0_at_times(tmp_path: Path) -> None:
    lines = [{"method": "m", "encoder": row, "head": row} for row in ([0.5, 0.5], [0.25, 0.25, 0.5])]
    (tmp_path / "batches.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert kept_coefficients(tmp_path)["m"]["encoder"].tolist() == [[0.5, 0.5, 0], [0.25, 0.25, 0.5]]
