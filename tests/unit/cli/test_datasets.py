"""The table of public data sets says what their records say, and so does its page."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedmerge.cli.datasets import dataset_page, records
from fedmerge.cli.main import app

ROOT = Path(__file__).resolve().parents[3]


def printed(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["datasets", *arguments])
    assert result.exit_code == code
    return result.output


def test_the_table_has_every_data_set() -> None:
    shown = printed()
    assert all(kind in shown for kind in records())
    assert "kind: messidor, dataset: messidor2" in shown
    assert "455,954" in shown
    assert "24,330 (not verified)" in shown


@pytest.mark.parametrize("kind", records())
def test_one_in_full_says_where_to_get_it(kind: str) -> None:
    shown = printed(kind)
    for facts in records()[kind].values():
        assert facts.where in shown
        assert facts.citation in shown
        assert facts.layout in shown
    assert "Fields:" in shown
    assert "  root: the folder that holds" in shown


def test_the_page_is_what_the_command_prints() -> None:
    assert (ROOT / "docs/data-sets.md").read_text(encoding="utf-8") == dataset_page() == printed("--markdown")


def test_a_data_set_that_is_not_known() -> None:
    said = printed("camelyon16", code=2)
    assert "did you mean 'camelyon17'?" in said
    assert "scenario" not in said
