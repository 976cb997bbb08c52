"""YAML in, a checked spec out, or every problem at once with its file and key."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedmerge.errors import Problem, ScenarioError, nearest

S = TypeVar("S", bound=BaseModel)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, which plain YAML would silently resolve to the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ScenarioError if it is missing, not YAML, not a mapping, or repeats a key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8 text"
        raise ScenarioError([Problem(str(path), "", str(reason), "a readable YAML file", _neighbors(path))]) from None
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ScenarioError([Problem(str(path), *_syntax(error))]) from None
    if not isinstance(content, dict):
        found = "an empty file" if content is None else f"a {type(content).__name__}"
        raise ScenarioError([Problem(str(path), "", found, "a mapping of keys to values")])
    return content


def check(model: type[S], content: Any, file: str) -> S:
    """`content` as a `model`. Raises ScenarioError with all problems, each with the key as it stands in the file."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ScenarioError([_problem(detail, content, file) for detail in _causes(error.errors())]) from None


def _causes(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without what only follows: a list whose items are wrong counts as too short, too."""

    def follows(detail: ErrorDetails) -> bool:
        depth = len(detail["loc"])
        return detail["type"] == "too_short" and any(
            len(other["loc"]) > depth and other["loc"][:depth] == detail["loc"] for other in details
        )

    return [detail for detail in details if not follows(detail)]


def _problem(detail: ErrorDetails, content: Any, file: str) -> Problem:
    key = _key(detail["loc"], content)
    context = detail.get("ctx", {})
    found = f"{detail['input']!r}"
    found = found if len(found) <= 80 else found[:77] + "..."
    match detail["type"]:
        case "unknown_key":
            return Problem(file, key, "an unknown key", "a known one", context["hint"])
        case "missing":
            return Problem(file, key, "nothing", "a value: this key is required")
        case "union_tag_invalid":
            known = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
            return Problem(file, key, f"'{context['tag']}'", "a known kind", nearest(context["tag"], known))
        case "union_tag_not_found":
            return Problem(file, key, found, "a mapping with the key 'kind'")
        case "value_error":
            return Problem(file, key, found, "", detail["msg"].removeprefix("Value error, "))
    return Problem(file, key, found, detail["msg"].removeprefix("Input should be "))


def _key(location: tuple[int | str, ...], content: Any) -> str:
    """The path of keys as the file has them: pydantic adds the kind of a plug-in, which stands beside its keys."""
    parts: list[str] = []
    node = content
    for position, step in enumerate(location):
        last = position == len(location) - 1
        if isinstance(step, int):
            parts.append(f"[{step}]")
            node = node[step] if isinstance(node, list | tuple) and step < len(node) else None
        elif isinstance(node, dict) and step in node:
            parts.append(f".{step}")
            node = node[step]
        elif last and not (isinstance(node, dict) and node.get("kind") == step):
            parts.append(f".{step}")
    return "".join(parts).lstrip(".")


def _syntax(error: yaml.YAMLError) -> tuple[str, str, str]:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return place, str(getattr(error, "problem", None) or error), "YAML"


def _neighbors(path: Path) -> str:
    siblings = [item.name for item in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    return nearest(path.name, siblings) if siblings else f"the folder {path.parent} has no YAML file"
