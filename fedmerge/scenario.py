"""What `scenarios/*.yaml` may say, and its reading: scenario, sites and target are checked as a whole before anything starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from fedmerge.configuration import check, read_yaml
from fedmerge.errors import Problem, ScenarioError, nearest
from fedmerge.experts.backbone import ModelSpec
from fedmerge.experts.initialisation import Initialisation
from fedmerge.experts.train import Training
from fedmerge.folder import Spec
from fedmerge.merge.method import METHODS, Method
from fedmerge.site import Site
from fedmerge.stream.schedule import SCHEDULES, Schedule


def _method_entry(value: Any) -> Any:
    """`eam` and `{eam: {gamma: 10}}` are the two ways to write a method; pydantic reports errors below the name."""
    if isinstance(value, Method):
        return value
    name, fields = value, {}
    if isinstance(value, dict) and len(value) == 1:
        ((name, fields),) = value.items()
    if not isinstance(name, str) or not isinstance(fields or {}, dict):
        raise ValueError("a method is its name, or one name with a mapping of its hyper-parameters below it")
    if name not in METHODS.names:
        raise ValueError(f"no such method: {nearest(name, METHODS.names)}")
    return {"kind": name, **(fields or {})}


def _method_entries(entries: Sequence[Method]) -> list[Any]:
    return [{entry.kind(): entry.model_dump(mode="json", exclude={"kind"})} for entry in entries]


AnySchedule: Any = SCHEDULES.union()
AnyMethod = Annotated[METHODS.union(), BeforeValidator(_method_entry)]


class Scenario(Spec):
    """One experiment: which hospitals, which model, which target, which stream, which methods."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,59}$", description="names the run folder")
    question: str = Field("", description="what the scenario asks, one line for the report")
    seed: int = Field(0, ge=0, description="root of all randomness")
    model: ModelSpec = Field(description="the backbone, by its timm name")
    initialisation: Initialisation = Field(description="theta_0, which all hospitals share")
    sites: tuple[str, ...] = Field(min_length=1, description="hospitals that train: names of files in sites/, or paths")
    training: Training = Field(default_factory=Training, description="how each hospital trains its runs")
    target: str = Field(description="the unseen hospital: name of a file in sites/, or a path")
    stream: AnySchedule = Field(description="order in which the target's images arrive")
    methods: Annotated[tuple[AnyMethod, ...], PlainSerializer(_method_entries)] = Field(min_length=1)
    target_deadline_s: float = Field(600, gt=0, description="longest wait for the target's next batches, seconds")


@dataclass(frozen=True)
class Plan:
    """A scenario whose every part has been checked. sites: in the scenario's order."""

    scenario: Scenario
    sites: tuple[Site, ...]
    target: Site
    classes: tuple[str, ...]

    def resolved(self) -> dict[str, Any]:
        """All that was asked for, with every default written out."""
        return {
            **self.scenario.model_dump(mode="json"),
            "sites": [site.model_dump(mode="json") for site in self.sites],
            "target": self.target.model_dump(mode="json"),
        }

    def sha256(self) -> str:
        """Digest of the resolved scenario."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Overrides:
    """What the command line changes in a scenario."""

    seed: int | None = None
    methods: tuple[str, ...] = ()
    add_sites: tuple[str, ...] = ()


def load(path: Path, overrides: Overrides | None = None) -> Plan:
    """Read and check a scenario with its sites. Raises ScenarioError with all problems at once."""
    overrides = overrides or Overrides()
    content = read_yaml(path)
    problems: list[Problem] = []
    scenario: Scenario | None = None
    try:
        scenario = check(Scenario, _overridden(content, overrides), str(path))
    except ScenarioError as error:
        problems += error.problems
    names = _strings(content.get("sites")) + list(overrides.add_sites)
    target_name = next(iter(_strings([content.get("target")])), None)
    sites = {name: _read_site(name, path, problems) for name in dict.fromkeys(names)}
    target = _read_site(target_name, path, problems) if target_name else None
    found = [site for site in sites.values() if site]
    problems += _names(str(path), names, target_name)
    problems += _agreement(found + ([target] if target else []))
    if scenario and target:
        problems += [_at(str(path), "stream", problem) for problem in scenario.stream.check(target.source.domains())]
        problems += _methods(str(path), scenario, [site.name for site in found], found + [target])
    if problems or scenario is None or target is None:
        raise ScenarioError(problems)
    return Plan(scenario, tuple(found), target, target.source.classes())


def _overridden(content: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """The scenario as the command line wants it; a method named there keeps the hyper-parameters of its entry, if any."""
    changed = dict(content)
    if overrides.seed is not None:
        changed["seed"] = overrides.seed
    if overrides.add_sites and isinstance(content.get("sites"), list):
        changed["sites"] = [*content["sites"], *overrides.add_sites]
    if overrides.methods:
        entries = content.get("methods")
        known: dict[str, Any] = {}
        for entry in entries if isinstance(entries, list) else []:
            name, fields = next(iter(entry.items())) if isinstance(entry, dict) and entry else (entry, None)
            known.setdefault((fields or {}).get("label", name) if isinstance(fields, dict) else name, entry)
        changed["methods"] = [known.get(name, name) for name in overrides.methods]
    return changed


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def site_file(name: str, scenario: Path) -> Path:
    """Where a site's YAML is: a path as given, else `sites/` beside the scenario's folder, in it, or in this folder."""
    if name.endswith((".yaml", ".yml")):
        given = Path(name)
        return given if given.is_absolute() or given.exists() else scenario.parent / given
    folders = [scenario.resolve().parent.parent / "sites", scenario.resolve().parent / "sites", Path("sites")]
    candidates = [folder / f"{name}.yaml" for folder in folders]
    return next((item for item in candidates if item.exists()), candidates[0])


def _read_site(name: str, scenario: Path, problems: list[Problem]) -> Site | None:
    file = site_file(name, scenario)
    try:
        site = check(Site, read_yaml(file), str(file))
    except ScenarioError as error:
        problems += error.problems
        return None
    if site.name != file.stem:
        problems.append(Problem(str(file), "name", f"'{site.name}'", f"'{file.stem}', the name of the file"))
    wrong = [_at(str(file), "source", problem) for problem in site.source.check()]
    problems += wrong
    return None if wrong else site


def _at(where: str, key: str, problem: Problem) -> Problem:
    inner = f"{key}.{problem.key}" if problem.key else key
    return Problem(where, inner, problem.found, problem.expected, problem.mend)


def _names(where: str, names: list[str], target: str | None) -> list[Problem]:
    stems = [Path(name).stem for name in names]
    problems = [
        Problem(where, "sites", f"'{stem}' {stems.count(stem)} times", "every site once")
        for stem in dict.fromkeys(stems)
        if stems.count(stem) > 1
    ]
    if target and Path(target).stem in stems:
        expected = "a hospital that trained nothing: the target must be unseen"
        problems.append(Problem(where, "target", f"'{target}', which is also among the sites", expected))
    return problems


def _agreement(sites: list[Site]) -> list[Problem]:
    """Sites must have the same classes in the same order, and no image in common."""
    problems: list[Problem] = []
    for site in sites[1:]:
        first, here = sites[0].source.classes(), site.source.classes()
        if here != first:
            missing, extra = sorted(set(first) - set(here)), sorted(set(here) - set(first))
            found = f"classes {', '.join(here)}" if not (missing or extra) else f"missing {missing}, extra {extra}"
            mend = f"'{sites[0].name}' has: {', '.join(first)}"
            problems.append(Problem(f"site '{site.name}'", "source", found, f"the classes of '{sites[0].name}'", mend))
    held = [(site.name, site.source.holdings(site.name)) for site in sites]
    for index, (name, items) in enumerate(held):
        for other, theirs in held[:index]:
            if name != other and items and theirs and (shared := items & theirs):
                found = f"{len(shared)} images that '{other}' has too, e.g. {min(shared)}"
                mend = "Give them different domains, or different parts of one split"
                problems.append(Problem(f"site '{name}'", "source", found, "images of its own", mend))
    return problems


def _methods(where: str, scenario: Scenario, names: list[str], sites: list[Site]) -> list[Problem]:
    keys = [method.key for method in scenario.methods]
    problems = [
        Problem(where, "methods", f"'{key}' {keys.count(key)} times", "every key once", "Give one of them a 'label'")
        for key in dict.fromkeys(keys)
        if keys.count(key) > 1
    ]
    for number, method in enumerate(scenario.methods):
        at = f"methods[{number}]"
        site = getattr(method, "site", None)
        if site is not None and site not in names:
            problems.append(Problem(where, f"{at}.site", f"'{site}'", "a site of the scenario", nearest(site, names)))
        if "hflip" in getattr(method, "augs", ()) and not all(item.source.flips for item in sites):
            expected = "views that preserve the label: a flip turns a left organ into a right one here"
            problems.append(Problem(where, f"{at}.augs", "'hflip'", expected, "Use 'shift' instead"))
    return problems


def json_schema(kind: str) -> dict[str, Any]:
    """The JSON schema of a scenario or a site, for editors. kind: "scenario" or "site"."""
    model = {"scenario": Scenario, "site": Site}[kind]
    schema = model.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


__all__ = ["Overrides", "Plan", "Scenario", "WithJsonSchema", "json_schema", "load", "site_file"]
