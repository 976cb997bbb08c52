"""Every message says where, what was found, what was expected, and how to mend it, in this order."""

from __future__ import annotations

import ast
import pickle
import re
from pathlib import Path

import pytest

from fedmerge import errors
from fedmerge.errors import Problem, ScenarioError, SourceError, UserError, nearest

FILES = sorted((Path(__file__).resolve().parents[2] / "fedmerge").rglob("*.py"))
MENDABLE = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, UserError)}


def written(node: ast.expr) -> str:
    """A message as it stands in the code, with the names of what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(written(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    return str(node.value) if isinstance(node, ast.Constant) else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(path.parents[1])))
def test_a_message_that_expects_something_has_found_something_first(path: Path) -> None:
    wrong = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        text = written(node.exc.args[0])
        if ast.unparse(node.exc.func) in MENDABLE and text:
            if re.search("expected", text) and not re.search("found.*expected", text, re.DOTALL):
                wrong.append(text)
            if re.search(r"(?<!\{)found", text) and not re.search(r"found.*(expected|missing|\{)", text, re.DOTALL):
                wrong.append(text)
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(path.parents[1])))
def test_a_problem_says_what_is_expected(path: Path) -> None:
    """An empty `expected` is for pydantic's sentences alone, which say it themselves."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func) == "Problem" and len(call.args) > 3]
    empty = [ast.unparse(call) for call in calls if isinstance(call.args[3], ast.Constant) and not call.args[3].value]
    assert path.name == "yaml_loader.py" or empty == []


def test_a_problem_is_where_found_expected_and_mend() -> None:
    problem = Problem("organs.yaml:12", "target", "'art'", "a site", "Did you mean 'axial'?")
    assert str(problem) == "organs.yaml:12: target: found 'art'; expected a site. Did you mean 'axial'?"
    near = Problem("organs.yaml", "target", "'axail'", "a site", nearest("axail", ["axial", "coronal"]))
    assert str(near) == "organs.yaml: target: found 'axail'; expected a site; did you mean 'axial'?"
    assert str(ScenarioError([problem])).splitlines() == ["the scenario cannot run: 1 problem", f"  - {problem}"]


def test_an_error_that_carries_problems_comes_through_to_another_process() -> None:
    problem = Problem("table", "file", "'a.csv', which is empty", "a row for each image")
    for error in (ScenarioError([problem]), SourceError(problem)):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.told) == (type(error), str(error), error.told)
