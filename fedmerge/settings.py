"""`--set key=value`: one key of a scenario from the command line, by the path that an error message would name."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from fedmerge.errors import Problem, ScenarioError, nearest

WHERE = "--set"
LISTS = ("methods", "uploads", "federated")
"""Lists of plug-ins, whose entries have names in place of numbers here."""


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

    A strategy's name is that of its row, e.g. `federated.fedavg-20.lr`, or its kind if no other is of that kind.
    What the key may be is checked with the scenario. Raises ScenarioError if the path leads through something that has no keys.
    """
    changed = copy.deepcopy(content)
    steps = key.split(".")
    if steps[0] in LISTS and len(steps) > 2:
        node, rest = _entry(changed, steps[0], key.removeprefix(f"{steps[0]}."))
        steps = rest.split(".")
    else:
        node = changed
    for step in steps[:-1]:
        inner = node.setdefault(step, {})
        if not isinstance(inner, dict):
            raise ScenarioError([Problem(WHERE, key, f"'{step}', which is {inner!r}", "a mapping with keys below it")])
        node = inner
    node[steps[-1]] = value
    return changed


def entry_names(folder: str, entries: Any) -> list[tuple[str, str]]:
    """Of every entry of a list of plug-ins, as it stands in YAML: its kind, and its name or that of its row."""
    found = []
    for entry in entries if isinstance(entries, list) else []:
        kind, fields = _parted(entry)
        found.append((str(kind), _row(str(kind), fields) if folder == "federated" else str(fields.get("label") or kind)))
    return found


def _parted(entry: Any) -> tuple[Any, dict[str, Any]]:
    kind, fields = next(iter(entry.items())) if isinstance(entry, dict) and entry else (entry, None)
    return kind, fields if isinstance(fields, dict) else {}


def _row(kind: str, fields: dict[str, Any]) -> str:
    """The name of a strategy's row; what is not a strategy is told when the scenario is checked."""
    from fedmerge.experts.strategy import STRATEGIES

    try:
        return STRATEGIES.load(kind)(**fields).key
    except (ScenarioError, ValidationError, TypeError):
        return str(fields.get("label") or kind)


def _entry(content: dict[str, Any], folder: str, path: str) -> tuple[dict[str, Any], str]:
    """The fields of one entry of a list of plug-ins, made a mapping in place if it was a bare name; and the path below it."""
    entries = content.get(folder)
    known = entry_names(folder, entries)
    names = [name for _, name in known]
    name = max((name for name in names if path.startswith(f"{name}.")), key=len, default=path.partition(".")[0])  # '.' in labels
    meant = [number for number, one in enumerate(names) if one == name][:1]
    if not meant and folder == "federated":
        meant = [number for number, (kind, _) in enumerate(known) if kind == name]
    if len(meant) != 1:
        raise ScenarioError([_unclear(folder, name, [names[number] for number in meant] or names, several=len(meant) > 1)])
    kind, fields = _parted(entries[meant[0]])  # type: ignore[index]
    entries[meant[0]] = {kind: (given := dict(fields))}  # type: ignore[index]
    return given, path.removeprefix(f"{name}.")


def _unclear(folder: str, name: str, names: Sequence[str], several: bool) -> Problem:
    """A name that no entry has, or that several have."""
    found = f"'{name}', of which there are {len(names)}" if several else f"'{name}'"
    hint = f"they are: {', '.join(names)}" if several else nearest(name, names) if names else f"there are no {folder}"
    return Problem(WHERE, f"{folder}.{name}", found, f"one of the scenario's {folder}", hint)


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
