"""A run in which hospitals came and went: rows of a part are marked, compared on common images, and drawn where they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedmerge.merging.state import Roster
from fedmerge.report.pages.run import write
from fedmerge.report.records import RunRecord
from fedmerge.report.summary import right, spans, summarize
from tests.unit.report.conftest import BATCHES, SIZE, info, steps_of


@pytest.fixture
def changed(record: RunRecord) -> RunRecord:
    """North is there until batch 8, then nobody but south; `guest` is a row of the first eight batches."""
    guest = [step for step in steps_of("guest", record.labels, 0.8, False, 5) if step.t < 8]
    rest = [step for step in record.steps if step.method != "eam"]
    eam = [
        replace(step, encoder=(0.25, 0.75), head=(0.5, 0.5)) if step.t < 8 else replace(step, encoder=(1.0,), head=(1.0,))
        for step in record.steps_of("eam")
    ]
    course = (Roster(0, ("north", "south")), Roster(8, ("south",), "north leaves"))
    return replace(record, steps=rest + eam + guest, methods=record.methods | {"guest": info("output")}, course=course)


def test_a_row_of_a_part_is_compared_with_the_mean_on_that_part(changed: RunRecord) -> None:
    summary = summarize(changed)
    row, mean = summary["methods"]["guest"], summary["methods"]["mean"]
    assert (row["covers"], row["ranked"], mean["covers"], mean["ranked"]) == ([[0, 7]], False, None, True)
    assert row["remark"] == "covers batches 0 to 7 only, and is compared with the mean on those"
    hits = right(changed, "mean")[: 8 * SIZE]
    assert row["vs_mean"]["difference"] == pytest.approx(row["accuracy"] - hits.mean())
    assert (row["segments"], row["halves"], row["err_vs_mean"], row["gap_closed"]) == ([], None, {}, None)
    assert summary["changes"] == [{"start": 8, "experts": ("south",), "change": "north leaves"}]
    assert spans(np.array([True, True, False, True])) == [[0, 1], [3, 3]]


def test_coefficients_of_different_experts_are_put_in_their_own_columns(changed: RunRecord) -> None:
    of = summarize(changed)["methods"]["eam"]["influence"]["encoder"]
    assert of["mean"] == pytest.approx({"north": 0.25 * 8 / BATCHES, "south": (0.75 * 8 + 12) / BATCHES})
    assert of["strongest"] == {"north": 0, "south": 1}
    alone, both = 1.0, float(np.exp(-(0.25 * np.log(0.25) + 0.75 * np.log(0.75))))
    assert of["effective"] == pytest.approx((8 * both + 12 * alone) / BATCHES)


def test_the_page_marks_the_moment(changed: RunRecord, tmp_path: Path) -> None:
    manifest = {**changed.manifest, "absent": {"west": "did not answer"}, "target_deaths": ["after batch 4"]}
    write(tmp_path, replace(changed, manifest=manifest))
    page = (tmp_path / "report.html").read_text()
    for words in ("before batch 8", "north leaves: south", "(batches 0 to 7)", "covers batches 0 to 7", "<strong>west</strong>"):
        assert words in page
    assert "The target died 1 time (after batch 4)" in page
    with np.load(tmp_path / "predictions.npz") as stored:
        guest = stored["p:guest"]
    assert np.isnan(guest[8 * SIZE :]).all()
    assert np.isfinite(guest[: 8 * SIZE]).all()
    assert "stroke-dasharray" in (tmp_path / "plots" / "running.svg").read_text()
