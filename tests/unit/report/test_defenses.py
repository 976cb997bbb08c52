"""A simulated attacker and what was done about it cannot be overlooked, and coefficients are those of who was merged."""

from __future__ import annotations

from dataclasses import replace

from fedmerge.report.pages.run import render
from fedmerge.report.records import RunRecord
from fedmerge.report.summary import summarize

PLOTS = dict.fromkeys(("accuracy", "running", "domains", "cost", "coefficients-0"), "<svg></svg>")
FINDING = {"site": "cheat", "check": "calibration", "value": 20.0, "bound": 4.0, "said": "20 times, most 4", "odd": True}
DONE = {"site": "cheat", "check": "calibration", "what": "left out", "why": "20 times, most 4"}


def test_an_attacker_that_was_left_out(record: RunRecord) -> None:
    cheat = replace(record.sites[0], name="cheat", attack="scale_head (factor 20.0)", left_out="calibration")
    vetting = {"findings": [FINDING], "done": [DONE], "left_out": {"cheat": "calibration"}, "remarks": ["patches: <none>"]}
    manifest = {**record.manifest, "vetting": {**vetting, "forwards": 1024, "seconds": 1.5}}
    cheated = replace(record, sites=[cheat, *record.sites], manifest=manifest)
    summary = summarize(cheated)
    assert [site["left_out"] for site in summary["sites"]] == ["calibration", "", ""]
    assert set(summary["methods"]["eam"]["influence"]["head"]["mean"]) == {"north", "south"}
    page = render(cheated, summary, PLOTS)
    assert "Simulated attacker: cheat" in page
    assert "Left out by the check of calibration" in page
    assert "<strong>cheat</strong> is left out by the check of calibration: 20 times, most 4" in page
    assert "patches: &lt;none&gt;" in page
    assert "of 2 experts count" in page


def test_nobody_cheats_and_nothing_is_said(record: RunRecord) -> None:
    page = render(record, summarize(record), PLOTS)
    assert "Simulated attacker" not in page
    assert 'id="defenses"' not in page
