"""Reading YAML: every problem at once, each with its file and key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from fedmerge.errors import ScenarioError, nearest
from fedmerge.registry import Spec
from fedmerge.system.yaml_loader import check, read_yaml


class Inner(Spec):
    amount: int = Field(1, ge=1)
    share: float = Field(0.0, le=1)

    @model_validator(mode="after")
    def _even(self) -> Inner:
        if self.amount == 7:
            raise ValueError("amount must not be 7")
        return self


class Circle(Spec):
    kind: Literal["circle"]
    radius: int = 0


class Square(Spec):
    kind: Literal["square"]
    side: int = 0


class Outer(Spec):
    name: str
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    shape: Annotated[Circle | Square, Field(discriminator="kind")]


def problems(content: object) -> list[str]:
    with pytest.raises(ScenarioError) as caught:
        check(Outer, content, "f.yaml")
    return [str(problem) for problem in caught.value.problems]


def test_all_problems_are_named_at_once() -> None:
    content = {
        "nam": 1,
        "inner": {"amount": 0, "shaer": 3},
        "many": [{"amount": 7}, {"share": 2}],
        "shape": {"kind": "square", "sides": 2},
    }
    text = problems(content)
    assert len(text) == 7
    assert "f.yaml: inner.amount: found 0; expected greater than or equal to 1" in text
    assert "f.yaml: inner.shaer: found an unknown key; expected a known one. did you mean 'share'?" in text
    assert "f.yaml: many[0]: found {'amount': 7}: amount must not be 7" in text
    assert "f.yaml: many[1].share: found 2; expected less than or equal to 1" in text
    assert "f.yaml: shape.sides: found an unknown key; expected a known one. did you mean 'side'?" in text
    assert "f.yaml: nam: found an unknown key; expected a known one. did you mean 'name'?" in text


def test_an_unknown_kind_names_the_nearest() -> None:
    assert problems({"name": "x", "shape": {"kind": "sqare"}}) == [
        "f.yaml: shape: found 'sqare'; expected a known kind. did you mean 'square'?"
    ]


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("name: a\nseed: 1\nname: b\n")
    with pytest.raises(ScenarioError, match=r"line 3, column 1.*'name' is given twice"):
        read_yaml(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "an empty file"), ("- a\n- b\n", "a list"), ("a: [1\n", "line 2"), ("a: \t1: 2\n", "line 1")],
)
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(ScenarioError, match=said):
        read_yaml(file)


def test_a_missing_file_names_its_neighbor(tmp_path: Path) -> None:
    (tmp_path / "organs.yaml").write_text("name: organs\n")
    with pytest.raises(ScenarioError, match=r"did you mean 'organs\.yaml'"):
        read_yaml(tmp_path / "organ.yaml")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ScenarioError, match="UTF-8"):
        read_yaml(tmp_path / "image.yaml")


def test_nearest_lists_what_is_known_when_nothing_is_near() -> None:
    assert nearest("qqq", ["mean", "ties"]) == "known: mean, ties"
