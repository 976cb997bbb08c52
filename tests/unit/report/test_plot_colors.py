"""Plots can be read on white and on dark paper, and say the same on a page as in their file."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest

from fedmerge.report.plots.run import draw
from fedmerge.report.plots.svg import DARK, LETTERS, LINES, PALETTE, QUIET, WHITE, as_source, contrast_ratio, readable
from fedmerge.report.records import RunRecord
from fedmerge.report.summary import summarize


def test_contrasts_are_those_of_the_standard() -> None:
    """Worked values of WCAG: #777777 on white is 4.48, #767676 the first gray that passes."""
    assert contrast_ratio("#000000", "#ffffff") == pytest.approx(21)
    assert contrast_ratio("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert contrast_ratio("#ffffff", "#767676") == pytest.approx(4.54, abs=0.005)


@pytest.mark.parametrize("color", [*PALETTE, QUIET])
def test_every_color_is_seen_on_white_and_its_names_are_read_on_both_papers(color: str) -> None:
    assert contrast_ratio(color, WHITE) >= LINES
    for paper in (WHITE, DARK):
        assert contrast_ratio(readable(color, paper), paper) >= LETTERS


def test_the_dark_paper_of_plots_is_that_of_pages() -> None:
    from importlib import resources

    style = (resources.files("fedmerge.report.pages") / "templates" / "style.css").read_text("utf-8")
    assert f"--paper: {DARK}" in style


def test_a_plot_on_a_page_says_what_its_file_says(record: RunRecord) -> None:
    for svg in draw(record, summarize(record)).values():
        source = as_source(svg)
        shown = unquote(source.removeprefix("data:image/svg+xml,"))
        assert re.findall(r"<text[^>]*>([^<]*)<", svg) == re.findall(r"<text[^>]*>([^<]*)<", shown)
        assert shown.count("<path") == svg.count("<path")
        assert "@media (prefers-color-scheme:dark){text{fill:#e9e9ec}" in shown
        assert not set(source) & set("\"'<>#\n")
        assert len(source) < 1.34 * len(svg)  # what base64 would have made of it


def test_letters_and_lines_on_dark_paper_have_their_contrast(record: RunRecord) -> None:
    """Every color of the plots has a rule, or is bright enough as it is."""
    for svg in draw(record, summarize(record)).values():
        shown = unquote(as_source(svg))
        for color in set(re.findall(r"stroke: (#[0-9a-f]{6})", svg)):
            ruled = re.search(rf'\[style\*="stroke: {color}"\]{{stroke:(#[0-9a-f]{{6}})!important}}', shown)
            assert contrast_ratio(ruled[1] if ruled else color, DARK) >= LINES
        for color in set(re.findall(r'<text style="[^"]*fill: (#[0-9a-f]{6})', svg)) - {"#111111"}:
            ruled = re.search(rf'text\[style\*="fill: {color}"\]{{fill:(#[0-9a-f]{{6}})!important}}', shown)
            assert contrast_ratio(ruled[1] if ruled else color, DARK) >= LETTERS
