"""What the command line changes in a scenario, before it is checked.

`--set key=value`: one key of a scenario from the command line, by the path that an error message would name.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fedmerge.errors import Problem, ScenarioError, nearest
from fedmerge.experiment.scenario import PROTOCOLS
from fedmerge.registry import FORMER, renamed
from fedmerge.system.yaml_loader import load_yaml

NAMED_BY_EVENTS = ("join", "leave", "replace", "by")

EACH = "each"
"""A target that stands for every domain in turn, left out of training."""


@dataclass(frozen=True)
class Overrides:
    """What the command line changes in a scenario.

    settings: keys and values of `--set`. target: another target; if it is one of the sites, it trains no more.
    without: sites that are left out, as if they had never been there, with the events that name them.
    """

    seed: int | None = None
    methods: tuple[str, ...] = ()
    add_sites: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    target: str | None = None
    without: tuple[str, ...] = ()
    backend: str | None = None
    jobs: int | None = None


def overridden(content: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """The scenario as the command line wants it; a method named there keeps its entry's hyper-parameters, if any.

    Raises ScenarioError for a site to leave out that the scenario does not have, and for a federated row among the methods.
    """
    _refuse_twice(overrides)
    changed = content | {key: value for key, value in overrides.settings if key == "protocol"}
    if changed.get("methods") is None and (known := PROTOCOLS.get(str(changed.get("protocol")))):
        changed["methods"] = known["methods"]  # so that settings can name their fields
    for key, value in sorted(overrides.settings, key=lambda pair: not pair[0].endswith(".kind")):  # fields of a kind come after it
        changed = assign(changed, key, value)
    changed |= {key: value for key in ("backend", "jobs", "seed") if (value := getattr(overrides, key)) is not None}
    if overrides.target is not None:
        has = changed.get("target")
        changed["target"] = {**has, "site": overrides.target} if isinstance(has, dict) else overrides.target
        if isinstance(changed.get("sites"), list):
            changed["sites"] = [site for site in changed["sites"] if _stem(site) != _stem(overrides.target)]
        changed = _no_task_of(changed, {_stem(overrides.target)})
    if overrides.add_sites and isinstance(changed.get("sites"), list):
        changed["sites"] = [*changed["sites"], *overrides.add_sites]
    if overrides.without:
        changed = _without(changed, overrides.without)
    if overrides.methods:
        changed["methods"] = _only(changed, overrides.methods)
    return changed


def _refuse_twice(overrides: Overrides) -> None:
    """Raises ScenarioError for a key that an option and `--set` both change: one of them would be lost."""
    options = {key: getattr(overrides, key) for key in ("backend", "jobs", "seed", "methods", "target")}
    problems = [
        Problem(WHERE, key, f"{value!r}, and --{option}, which changes the same key", "one of them")
        for key, value in overrides.settings
        if options.get(option := key.removesuffix(".site")) not in (None, ()) and value != EACH  # each domain has its own target
    ]
    if problems:
        raise ScenarioError(problems)


def target_named(content: dict[str, Any]) -> str | None:
    """The target's name as a scenario gives it, alone or in a mapping; None for what is no name."""
    given = content.get("target")
    name = given.get("site") if isinstance(given, dict) else given
    return name if isinstance(name, str) else None


def domains_in_turn(content: dict[str, Any], file: str) -> list[tuple[str, tuple[str, ...]]]:
    """Every domain of a scenario that may be left out in turn: its sites, and its target unless that is `each`.

    With each comes who trains beside the other sites: that target, where it is not the one left out.
    Raises ScenarioError, naming the file, for what is no list of names, and for less than two domains.
    """
    sites, target = content.get("sites"), target_named(content)
    if not (isinstance(sites, list) and all(isinstance(site, str) for site in sites)):
        raise ScenarioError([Problem(file, "sites", f"{sites!r}", "a list of names, e.g. [a, b]")])
    trains = (target,) if target not in (None, EACH) and _stem(target) not in map(_stem, sites) else ()
    found = list(dict.fromkeys([*sites, *trains]))
    if len(found) < 2:
        what = f"'{found[0]}' alone" if found else "none"
        raise ScenarioError([Problem(file, "sites", what, "two or more, of which each is the target once while the others train")])
    return [(name, () if name in trains else trains) for name in found]


def _only(content: dict[str, Any], names: Sequence[str]) -> list[Any]:
    """The entries of these methods, or bare names. Raises ScenarioError for a row of `federated`, which is no method."""
    entries = content.get("methods")
    known: dict[str, Any] = {}
    for (_, name), entry in zip(entry_names("methods", entries), entries if isinstance(entries, list) else [], strict=True):
        known.setdefault(name, entry)
    rows = {name for pair in entry_names("federated", content.get("federated")) for name in pair}
    mend = "Those rows are in every run, whatever --methods says; --set 'federated=[]' leaves them out"
    problems = [
        Problem("--methods", "", f"'{name}', which is below the scenario's 'federated'", "names of methods", mend)
        for name in names
        if name in rows and name not in known
    ]
    if problems:
        raise ScenarioError(problems)
    return [known.get(name, name) for name in names]


def _without(content: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """No site of these names, and no event that names one."""
    sites = content["sites"] if isinstance(content.get("sites"), list) else []
    events = content["events"] if isinstance(content.get("events"), list) else []
    gone = {_stem(name) for name in names}
    known = {_stem(site) for site in sites} | {name for event in events for name in _named(event)}
    problems = [
        Problem("--without", "", f"'{name}'", "a site of the scenario", nearest(name, known)) for name in sorted(gone - known)
    ]
    if not problems and sites and not {_stem(site) for site in sites} - gone:
        problems = [Problem("--without", "", ", ".join(sorted(gone)), "at least one site that stays")]
    if problems:
        raise ScenarioError(problems)
    left = _no_task_of({**content, "sites": [site for site in sites if _stem(site) not in gone]}, gone)
    return left | ({"events": [event for event in events if not gone & _named(event)]} if events else {})


def _no_task_of(content: dict[str, Any], gone: set[str]) -> dict[str, Any]:
    """The scenario without the classes of sites that do not train in it."""
    tasks = content.get("classes")
    return {**content, "classes": {k: v for k, v in tasks.items() if k not in gone}} if isinstance(tasks, dict) else content


def _named(event: Any) -> set[str]:
    return {_stem(event[key]) for key in NAMED_BY_EVENTS if event.get(key)} if isinstance(event, dict) else set()


def _stem(name: Any) -> str:
    return Path(str(name)).stem


WHERE = "--set"
LISTS = ("methods", "uploads", "federated")
"""Lists of plug-ins, whose entries have names in place of numbers here."""


def parse(text: str) -> tuple[str, tuple[Any, ...]]:
    """`stream.delta=0.01,0.1` as its key and its values, which are the items of a list in YAML.

    Raises ScenarioError if there is no key, or a value is not YAML.
    """
    key, equals, rest = text.partition("=")
    if not equals or not key.strip() or not rest.strip():
        raise ScenarioError([Problem(WHERE, "", f"'{text}'", "KEY=VALUE, e.g. stream.batch_size=16")])
    values, why = None, ""
    try:
        values = load_yaml(f"[{rest}\n]")
    except yaml.YAMLError as error:
        why = str(getattr(error, "problem", None) or "").removeprefix("found ")
    except (ValueError, LookupError) as error:
        why = str(error)
    except RecursionError:
        why = "too deep to be read"
    if not isinstance(values, list):
        rest, why = rest if len(rest) <= 80 else f"{rest[:77]}...", why and f" ({why})"
        expected, mend = "values in YAML, with commas between them", "A text with ?, brackets or braces in it needs quotes"
        raise ScenarioError([Problem(WHERE, key.strip(), f"'{rest}'{why}", expected, mend)])
    return key.strip(), tuple(values)


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
    changed: dict[str, Any] = renamed(copy.deepcopy(content))
    steps = [FORMER.get(step, step) for step in key.split(".")]
    key = ".".join(steps)
    if steps[0] in LISTS and len(steps) > 2:
        node, rest = _entry(changed, steps[0], key.removeprefix(f"{steps[0]}."))
        steps = rest.split(".")
    else:
        node = changed
        if steps[0] == "target" and len(steps) > 1 and isinstance(changed.get("target"), str):
            changed["target"] = {"site": changed["target"]}  # a bare name stands for the mapping
    for step in steps[:-1]:
        inner = node.setdefault(step, {})
        if not isinstance(inner, dict):
            raise ScenarioError([Problem(WHERE, key, f"'{step}', which is {inner!r}", "a mapping with keys below it")])
        node = inner
        for old in FORMER.keys() & node.keys():
            node[FORMER[old]] = node.pop(old)
    if steps[-1] == "kind" and steps[0] in ("stream", "initialization") and (known := _fields(steps[0], value)):
        for field in (_fields(steps[0], node.get("kind")) - known) & node.keys():
            del node[field]
    node[steps[-1]] = value
    return changed


def _fields(part: str, kind: Any) -> set[str]:
    """Keys of a schedule or an initialization, of which those of a former kind go with it; none of what is no kind."""
    from fedmerge.federated.server.initialization import Checkpoint, Pretrained, Proxy
    from fedmerge.stream.schedules._base import SCHEDULES

    if part == "stream":
        return set(SCHEDULES.load(kind).model_fields) if kind in SCHEDULES.names else set()
    kinds: dict[str, type[BaseModel]] = {"pretrained": Pretrained, "checkpoint": Checkpoint, "proxy": Proxy}
    return set(kinds[kind].model_fields) if isinstance(kind, str) and kind in kinds else set()


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
    from fedmerge.federated.strategies._base import STRATEGIES

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
