"""What the command line changes in a scenario, before it is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmerge.errors import Problem, ScenarioError, nearest
from fedmerge.settings import assign, entry_names

NAMED_BY_EVENTS = ("join", "leave", "replace", "by")


@dataclass(frozen=True)
class Overrides:
    """What the command line changes in a scenario.

    settings: keys and values, as in `fedmerge.settings`. target: another target; if it is one of the sites, it trains no more.
    without: sites that are left out, as if they had never been there, with the events that name them.
    """

    seed: int | None = None
    methods: tuple[str, ...] = ()
    add_sites: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    target: str | None = None
    without: tuple[str, ...] = ()


FLAT = {"target.site": "target"} | {f"target.{name}": f"target_{name}" for name in ("max_bytes", "shards", "gpus", "resource")}
"""Keys below `target` in a scenario, and the fields that they are once it is flattened."""


def overridden(content: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """The scenario as the command line wants it; a method named there keeps its entry's hyper-parameters, if any.

    Raises ScenarioError for a site to leave out that the scenario does not have, and for a federated row among the methods.
    """
    changed = dict(content)
    for key, value in overrides.settings:
        changed = assign(changed, FLAT.get(key, key), value)
    if overrides.seed is not None:
        changed["seed"] = overrides.seed
    if overrides.target is not None:
        changed["target"] = overrides.target
        if isinstance(content.get("sites"), list):
            changed["sites"] = [site for site in content["sites"] if site != overrides.target]
    if overrides.add_sites and isinstance(changed.get("sites"), list):
        changed["sites"] = [*changed["sites"], *overrides.add_sites]
    if overrides.without:
        changed = _without(changed, overrides.without)
    if overrides.methods:
        changed["methods"] = _only(changed, overrides.methods)
    return changed


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
    left = {**content, "sites": [site for site in sites if _stem(site) not in gone]}
    return left | ({"events": [event for event in events if not gone & _named(event)]} if events else {})


def _named(event: Any) -> set[str]:
    return {_stem(event[key]) for key in NAMED_BY_EVENTS if event.get(key)} if isinstance(event, dict) else set()


def _stem(name: Any) -> str:
    return Path(str(name)).stem
