"""`--set key=value`: one key of a scenario from the command line, by the path that an error message would name."""

from __future__ import annotations

import copy
from typing import Any

import yaml

from fedmerge.errors import Problem, ScenarioError, nearest

WHERE = "--set"


def parse(text: str) -> tuple[str, tuple[Any, ...]]:
    """`stream.delta=0.01,0.1` as its key and its values, which are YAML; a comma within brackets or quotes parts nothing.

    Raises ScenarioError if there is no key, or a value is not YAML.
    """
    key, equals, rest = text.partition("=")
    if not equals or not key.strip() or not rest.strip():
        raise ScenarioError([Problem(WHERE, "", f"'{text}'", "KEY=VALUE, e.g. stream.batch_size=16")])
    try:
        return key.strip(), tuple(yaml.safe_load(part) for part in _parts(rest))
    except yaml.YAMLError:
        raise ScenarioError([Problem(WHERE, key.strip(), f"'{rest}'", "values in YAML, with commas between them")]) from None


def single(text: str) -> tuple[str, Any]:
    """One key and one value. Raises ScenarioError if there are several."""
    key, values = parse(text)
    if len(values) != 1:
        raise ScenarioError([Problem(WHERE, key, f"{len(values)} values", "one; several are for fedmerge sweep")])
    return key, values[0]


def assign(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A scenario's mapping with one key changed; `methods.eam.gamma` is the key `gamma` of the entry with that name or label.

    What the key may be is checked with the scenario. Raises ScenarioError if the path leads through something that has no keys.
    """
    changed = copy.deepcopy(content)
    steps = key.split(".")
    if steps[0] in ("methods", "uploads") and len(steps) > 2:
        node = _entry(changed, steps[0], steps[1])
        steps = steps[2:]
    else:
        node = changed
    for step in steps[:-1]:
        inner = node.setdefault(step, {})
        if not isinstance(inner, dict):
            raise ScenarioError([Problem(WHERE, key, f"'{step}', which is {inner!r}", "a mapping with keys below it")])
        node = inner
    node[steps[-1]] = value
    return changed


def _entry(content: dict[str, Any], folder: str, name: str) -> dict[str, Any]:
    """The fields of one entry of a list of plug-ins, made a mapping in place if it was a bare name."""
    entries = content.get(folder)
    names: list[str] = []
    for number, entry in enumerate(entries if isinstance(entries, list) else []):
        kind, fields = next(iter(entry.items())) if isinstance(entry, dict) and entry else (entry, None)
        label = fields.get("label") if isinstance(fields, dict) else None
        names.append(str(label or kind))
        if names[-1] == name:
            given = dict(fields) if isinstance(fields, dict) else {}
            entries[number] = {kind: given}  # type: ignore[index]
            return given
    raise ScenarioError([Problem(WHERE, f"{folder}.{name}", f"'{name}'", f"one of the scenario's {folder}", nearest(name, names))])


def _parts(text: str) -> list[str]:
    depth, quote, parts = 0, "", [""]
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += (letter in "[{") - (letter in "]}") if not quote else 0
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
