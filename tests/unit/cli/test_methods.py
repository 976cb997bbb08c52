"""The table of methods comes from the folder; tests/unit/merging/test_laws.py counts what each declares as its cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmerge.cli.methods import describe, row
from fedmerge.errors import MethodError
from fedmerge.merging.methods._base import METHODS
from tests.front_door import fedmerge


def test_costs_are_those_of_the_papers() -> None:
    declared = {name: METHODS.load(name).cost for name in ("mean", "ensemble", "eam", "t3_batch", "dcs")}
    assert declared == {"mean": "1", "ensemble": "K", "eam": "3K + 1", "t3_batch": "K + 2", "dcs": "K"}


@pytest.mark.parametrize("name", METHODS.names)
def test_every_method_has_its_row_and_its_page(name: str) -> None:
    assert all(row(name))
    assert METHODS.load(name).cost in row(name)
    page = describe(name)
    assert METHODS.load(name).paper in page
    assert all(f"  {field}: " in page for field in METHODS.load(name).model_fields if field != "kind")
    assert "Annotated" not in page


def test_the_verb_prints_them_and_helps_with_a_typo(tmp_path: Path) -> None:
    whole = fedmerge(tmp_path, "methods")
    assert whole.returncode == 0, whole.stderr
    assert all(name in whole.stdout for name in METHODS.names)
    wrong = fedmerge(tmp_path, "methods", "dawn").stderr
    assert wrong == "fedmerge: method: found 'dawn'; expected a known one: did you mean 'dawin'?\n"
    with pytest.raises(MethodError):
        describe("dawn")
