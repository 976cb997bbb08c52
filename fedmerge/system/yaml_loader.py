"""YAML in, a checked spec out, or every problem at once with its file, line and key.

Values are PyYAML's. ruamel.yaml reads the same text for what PyYAML does not tell: lines, and keys that are given twice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.resolver import VersionedResolver

from fedmerge.errors import Problem, ScenarioError, nearest, quoted
from fedmerge.system.files import is_there

S = TypeVar("S", bound=BaseModel)
ENCODING = "utf-8-sig"
"""UTF-8, with a byte order mark in front or without, as editors on Windows write it."""

TAKEN_FOR = ((bool, "truth value"), (int | float, "number"), (date, "date"))
"""What YAML makes of words without quotes, such as `no`, `2023` and `2023-05-01`."""

IN_QUOTES = "Put it in quotes: without them, YAML takes it for a"
MOST_VALUES = 1_000_000
"""Values in a file, those of anchors as often as they are named: a few lines of anchors can make more than memory holds."""

MENDS = {
    r"'\t'": "Indent with spaces: YAML takes no tabs",
    "mapping values are not allowed": "Put a text with ': ' in it in quotes",
    "'@'": "Put a text that begins with it in quotes",
    "'%'": "Put a text that begins with it in quotes",
    "'`'": "Put a text that begins with it in quotes",
    "special characters": "Save it as UTF-8",
    "another document": "Leave out the line '---' before it: a file holds one",
    "undefined alias": "Put a text that begins with * in quotes; else it stands for the value of an anchor above, e.g. &name",
}
"""How to mend what a reader says, by words of it."""

DEFAULT_KIND = "timm"
"""The kind of a model that does not say it."""

ITEM = re.compile(r"\[(\d+)\]")


class _AllText(VersionedResolver):
    """Takes no scalar for a number, a date or the like: values are not ruamel's business."""

    @property
    def versioned_resolver(self) -> dict[Any, Any]:
        return {}


MERGE = "tag:yaml.org,2002:merge"
TEXT = "tag:yaml.org,2002:str"
OF_YAML_1_1 = re.compile(r"[-+]?0[0-7_]+|[-+]?[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?|=")
"""Octal numbers, numbers in base 60, and the key of a default value: nobody means 8 by `010`, or 90 by `1:30`."""


class _OneOfAKey(yaml.SafeLoader):
    """Refuses keys that only their values show to be the same, such as `yes` and `true`, and merges mappings (`<<`) as YAML has it.

    PyYAML knows merged keys again by the place of their text in memory, and may give back the value that was to be replaced.
    What YAML 1.1 alone takes for a number is text, as in YAML 1.2: where a number is expected, `1:30` is refused, and `010` is 10.
    """

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        """The tag of a node that does not give one."""
        plain = kind is yaml.ScalarNode and implicit[0]
        return TEXT if plain and OF_YAML_1_1.fullmatch(value) else super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """A mapping's own keys before merged ones, and among these the first before the next."""
        own = [(key, value) for key, value in node.value if key.tag != MERGE]
        merged: dict[tuple[str, str], tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if key.tag == MERGE:
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(source, yaml.MappingNode):
                        said = f"found a {source.id} after <<, which takes mappings"
                        raise yaml.constructor.ConstructorError(None, None, said, source.start_mark)
                    self.flatten_mapping(source)
                    for pair in source.value:
                        merged.setdefault(_name(pair[0]), pair)
        names = {_name(key) for key, _ in own}
        node.value = [pair for name, pair in merged.items() if name not in names] + own

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != MERGE:
                key = self.construct_object(name)
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"found key '{name.value}' given twice", name.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """What a text says. Raises PyYAML's error, ValueError, LookupError or RecursionError; also for values within themselves."""
    try:
        content = yaml.load(text, _OneOfAKey)
    except AttributeError:  # how PyYAML stumbles over it
        raise ValueError("a date (!!timestamp) that is none") from None
    if _size(content, {}) > MOST_VALUES:
        raise ValueError(f"anchors that make more than {MOST_VALUES} values")
    return content


def _size(node: Any, known: dict[int, int]) -> int:
    """Values in all. known: sizes by identity; 0 while what is within is counted."""
    if not isinstance(node, dict | list):
        return 1
    if known.get(id(node)) == 0:
        raise ValueError("an anchor within its own value")
    if id(node) not in known:
        known[id(node)] = 0
        inner = node.values() if isinstance(node, dict) else node
        known[id(node)] = 1 + sum(_size(item, known) for item in inner)
    return known[id(node)]


def _name(key: yaml.Node) -> tuple[str, str]:
    return key.tag, str(key.value)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ScenarioError if it is missing, not YAML, not a mapping, or repeats a key."""
    try:
        text = path.read_text(encoding=ENCODING)
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        found = f"a byte that is no UTF-8 text (0x{error.object[error.start]:02x} in line {line})"
        raise ScenarioError([Problem(str(path), "", found, "a YAML file in UTF-8", "Save it as UTF-8")]) from None
    except OSError as error:
        near = _neighbors(path) if isinstance(error, FileNotFoundError | PermissionError) else ""
        raise ScenarioError([Problem(str(path), "", str(error.strerror), "a readable YAML file", near)]) from None
    except ValueError as error:  # a NUL in its name
        raise ScenarioError([Problem(quoted(path), "", f"no name of a file ({error})", "a readable YAML file")]) from None
    try:
        content = load_yaml(text)
        _positions(text)
    except (yaml.YAMLError, YAMLError) as error:
        raise ScenarioError([_syntax(error, text, str(path))]) from None
    except RecursionError:
        raise ScenarioError([Problem(str(path), "", "mappings or lists within one another, too deep to be read", "YAML")]) from None
    except (ValueError, LookupError) as error:  # how PyYAML refuses the 99th of a month
        raise ScenarioError([Problem(str(path), "", f"a value that is not of its kind ({error})", "YAML")]) from None
    if not isinstance(content, dict):
        found = "an empty file" if content is None else f"a {type(content).__name__}"
        raise ScenarioError([Problem(str(path), "", found, "a mapping of keys to values")])
    return content


def check(model: type[S], content: Any, file: str) -> S:
    """`content` as a `model`. Raises ScenarioError with all problems, each with the key as it stands in the file."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ScenarioError([_problem(detail, content, file) for detail in _causes(error.errors(), content)]) from None


def read_as(model: type[S], path: Path) -> S:
    """What a file says, as a `model`. Raises ScenarioError with all problems, each with its line and key."""
    content = read_yaml(path)
    with lines_named(path):
        return check(model, content, str(path))


@contextmanager
def lines_named(path: Path, same: Callable[[str], bool] = lambda key: True) -> Iterator[None]:
    """Problems of this file that are raised within get their lines, as by `lined`."""
    try:
        yield
    except ScenarioError as error:
        raise ScenarioError(lined(error.problems, path, same)) from None


def lined(problems: Sequence[Problem], path: Path, same: Callable[[str], bool] = lambda key: True) -> list[Problem]:
    """The problems; those of this file, with the line of their key. A key that is missing has its parent's line, if that has one.

    same: whether a key has the value that stands in the file. Another is of the command line, which has no line.
    """
    named = [
        replace(p, where=f"{path}, as the command line changes it") if p.where == str(path) and not same(p.key) else p
        for p in problems
    ]
    mine = [problem.where == str(path) for problem in named]
    try:
        tree = _positions(path.read_text(encoding=ENCODING)) if any(mine) else None
    except (OSError, UnicodeDecodeError, YAMLError):  # gone or changed since it was read
        tree = None
    lines = [_line(tree, problem.key) if known else None for problem, known in zip(named, mine, strict=True)]
    told = [_as_written(p, tree) if known and tree else p for p, known in zip(named, mine, strict=True)]
    return [replace(p, where=f"{p.where}, line {line}") if line else p for p, line in zip(told, lines, strict=True)]


def _as_written(problem: Problem, tree: Any) -> Problem:
    """Of a word that lacks quotes, the word, and not what YAML has made of it."""
    written, rest = value_at(tree, problem.key)
    lacks = problem.mend.startswith(IN_QUOTES) and isinstance(written, str) and not rest
    return replace(problem, found=written) if lacks else problem


def value_at(content: Any, key: str) -> tuple[Any, str]:
    """The value at a path of keys as messages name it, e.g. `methods[0].eam.gamma`; and what of the path it does not have."""
    *_, (_, _, value, rest) = _walk(content, key)
    return value, rest


def _positions(text: str) -> Any:
    """The document with all scalars as text, in ruamel's containers, which know their lines. Raises its error for a key twice."""
    reader = YAML(typ="rt", pure=True)
    reader.Resolver = _AllText
    return reader.load(text)


def _walk(node: Any, key: str) -> Iterator[tuple[Any, Any, Any, str]]:
    """Down the path: container, step, the value there, what is left of the path; first the whole."""
    yield None, None, node, key
    while key:
        step: Any = None
        if isinstance(node, dict):
            fit = [name for name in node if str(name) == key or key.startswith((f"{name}.", f"{name}["))]
            fit = fit or [name for name in node if isinstance(name, str) and _meant(name) == key]
            step = max(fit, key=lambda name: len(str(name)), default=None)
            rest = key[len(str(step)) :]
        elif isinstance(node, list) and (item := ITEM.match(key)) and int(item[1]) < len(node):
            step, rest = int(item[1]), key[item.end() :]
        if step is None:
            return
        key = rest.removeprefix(".")
        yield node, step, node[step], key
        node = node[step]


def _meant(name: str) -> str:
    """A key without quotes as YAML takes it."""
    try:
        return str(load_yaml(name))
    except (yaml.YAMLError, ValueError, LookupError):
        return name


def _line(tree: Any, key: str) -> int | None:
    line = None
    for container, step, _, _ in _walk(tree, key):
        if container is not None:
            known = container.lc
            line = (known.item(step) if isinstance(container, list) else known.key(step))[0] + 1
    return line


def _causes(details: list[ErrorDetails], content: Any) -> list[ErrorDetails]:
    """Without what only follows: a list whose items are wrong counts as too short, too; a value of one of several types is none
    of the others.
    """
    judged = {_key(detail["loc"], content) for detail in details if not detail["type"].endswith("_type")}

    keys = {_key(detail["loc"], content) for detail in details}

    def follows(detail: ErrorDetails) -> bool:
        depth, key = len(detail["loc"]), _key(detail["loc"], content)
        if detail["type"].endswith("_type") and (key in judged or any(one.startswith((f"{key}.", f"{key}[")) for one in keys)):
            return True
        return detail["type"] == "too_short" and any(
            len(other["loc"]) > depth and other["loc"][:depth] == detail["loc"] for other in details
        )

    return [detail for detail in details if not follows(detail)]


def _problem(detail: ErrorDetails, content: Any, file: str) -> Problem:
    key = _key(detail["loc"], content)
    context = detail.get("ctx", {})
    found = str(detail["input"]) if isinstance(detail["input"], date) else f"{detail['input']!r}"
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
        case "string_type" if detail["input"] is None:
            return Problem(file, key, "nothing", "text")
        case "string_type" if detail["loc"][-1] == "[key]" and (taken := _taken_for(detail["input"])):
            return _key_in_quotes(file, _key(detail["loc"][:-2], content), detail["input"], taken)
        case "path_type":
            taken = _taken_for(detail["input"])
            return Problem(file, key, found, "a path", f"{IN_QUOTES} {taken}" if taken else "")
        case "string_type" if taken := _taken_for(detail["input"]):
            return Problem(file, key, str(detail["input"]), "text", f"{IN_QUOTES} {taken}")
        case "invalid_key" if taken := _taken_for(detail["input"]):
            return _key_in_quotes(file, _key(detail["loc"][:-1], content), detail["input"], taken)
        case "tuple_type" | "list_type":
            items = ", ".join(part.strip() for part in str(detail["input"]).split(","))
            return Problem(file, key, found, f"a list, e.g. [{items}]" if isinstance(detail["input"], str) else "a list")
        case "dict_type" | "model_type" | "model_attributes_type":
            return Problem(file, key, found, "a mapping of keys to values")
        case "value_error":
            return Problem(file, key, found, "", detail["msg"].removeprefix("Value error, "))
    expected = detail["msg"].removeprefix("Input should be ").replace(" after validation", "")
    return Problem(file, key, found, SHOULD.sub(lambda start: f"{ASKED[start[1]]} that should ", expected))


def _key_in_quotes(file: str, above: str, given: Any, taken: str) -> Problem:
    key = ".".join(filter(None, [above, str(given)]))
    return Problem(file, key, f"a key that YAML takes for a {taken}", "text", "Put it in quotes")


ASKED = {"String": "text", "Tuple": "a list", "List": "a list", "Dictionary": "a mapping"}
SHOULD = re.compile(rf"^({'|'.join(ASKED)}) should ")
"""How pydantic begins to say what a value of the right type lacks."""


def _taken_for(value: Any) -> str:
    return next((word for kind, word in TAKEN_FOR if isinstance(value, kind)), "")


TYPE = re.compile(r"[-\[(]|^(str|int|float|bool)$")
"""In what pydantic calls one of several types of a field: `constrained-int`, `list[str]`."""


def _key(location: tuple[int | str, ...], content: Any) -> str:
    """The path of keys as the file has them: pydantic adds the kind of a plug-in, which stands beside its keys, and the type of
    which a value might have been.
    """
    parts: list[str] = []
    node = content
    for position, step in enumerate(location):
        last = position == len(location) - 1
        if isinstance(node, dict) and step in node:
            parts.append(f".{step}")
            node = node[step]
        elif isinstance(step, int):
            parts.append(f"[{step}]")
            node = node[step] if isinstance(node, list | tuple) and step < len(node) else None
        elif last and not TYPE.search(str(step)) and not (isinstance(node, dict) and node.get("kind", DEFAULT_KIND) == step):
            parts.append(f".{step}")
    return "".join(parts).lstrip(".")


def _syntax(error: Exception, text: str, file: str) -> Problem:
    """What either reader says, of the place where it says it; of characters that may not be there PyYAML counts all before."""
    mark, position = getattr(error, "problem_mark", None), getattr(error, "position", None)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    if isinstance(position, int):
        place = f", line {text.count(chr(10), 0, position) + 1}"
    said = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    said = said.removeprefix("but ").removeprefix("found ")
    key, twice, _ = said.removeprefix("duplicate key ").partition('" with value "')
    if twice:
        return Problem(f"{file}{place}", "", f"key '{key.strip(chr(34))}' given twice", "every key once")
    if said.endswith("given twice"):
        return Problem(f"{file}{place}", "", said, "every key once")
    if wanted := re.fullmatch(r"expected (.+), but (?:got|found) (.+)", said):
        return Problem(f"{file}{place}", "", wanted[2], wanted[1])
    mend = next((mend for words, mend in MENDS.items() if words in said), "")
    return Problem(f"{file}{place}", "", said, "YAML", mend)


def _neighbors(path: Path) -> str:
    if not os.access(path.parent, os.R_OK | os.X_OK) and is_there(path.parent):
        return f"Give this user the right to read {path.parent}"
    siblings = [item.name for item in path.parent.glob("*.yaml") if item != path] if is_there(path.parent) else []
    return nearest(path.name, siblings) if siblings else f"the folder {path.parent} has no YAML file"
