"""A whole experiment, read and checked before anything starts: scenario, sites and target, all problems at once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedmerge.data.cache import unusable
from fedmerge.data.corruptions._base import mismatched
from fedmerge.errors import Problem, ScenarioError
from fedmerge.experiment.overrides import EACH, domains_in_turn, overridden, target_named
from fedmerge.experiment.overrides import Overrides as Overrides
from fedmerge.experiment.scenario import Scenario, filled
from fedmerge.experiment.validation.classes import class_problems, seen_by
from fedmerge.experiment.validation.methods import biasless, method_problems, of_one_name, prior_problems
from fedmerge.experiment.validation.problems import once, placed
from fedmerge.experiment.validation.sites import (
    agreement_problems,
    copied,
    event_problems,
    name_problems,
    of_two_sites,
    one_of_each,
    shown_otherwise,
)
from fedmerge.experiment.validation.training import (
    brought_by,
    generalist_nowhere,
    public_problems,
    start_nowhere,
    unfit,
    unmeasurable,
    unprotected,
    untrained,
    without_theta_0,
)
from fedmerge.federated.model import try_out
from fedmerge.federated.server.initialization import PUBLIC
from fedmerge.federated.site import Site
from fedmerge.system.files import at_home, file_digest, is_there
from fedmerge.system.yaml_loader import check, lined, lines_named, read_as, read_yaml, value_at


@dataclass(frozen=True)
class RunOptions:
    """Where a run reads and writes. resume: go on from the folder's last snapshot, if there is one. threads: of the target.

    log: tools that numbers are written for beside the report: tensorboard, mlflow.
    """

    out: Path
    pool: Path
    resume: bool = False
    quiet: bool = False
    threads: int | None = None
    log: tuple[str, ...] = ()


WITHOUT_EFFECT = frozenset({"backend", "jobs"})
"""Keys of a scenario that change no result."""


@dataclass(frozen=True)
class Experiment:
    """A scenario whose every part has been checked. sites: all that train, founders first, then those that events let join.

    classes: those that hospitals train on, all together. target_classes: the target's, which only differ where a model reads
    prompts.
    in_turn: the target is one of several that the scenario leaves out in turn. filled: keys whose values its protocol gives.
    """

    scenario: Scenario
    sites: tuple[Site, ...]
    target: Site
    classes: tuple[str, ...]
    target_classes: tuple[str, ...]
    in_turn: bool = False
    filled: tuple[str, ...] = ()

    @property
    def founders(self) -> tuple[str, ...]:
        """Names of the sites that are there from the beginning."""
        return tuple(site.name for site in self.sites[: len(self.scenario.sites)])

    @cached_property
    def tasks(self) -> dict[str, tuple[str, ...]]:
        """The classes of each hospital, where hospitals have tasks of their own; empty where all train on the same."""
        own = {site.name: self.scenario.trains_on(site) for site in self.sites}
        return own if len({frozenset(names) for names in own.values()}) > 1 else {}

    @property
    def run_dir(self) -> Path:
        """Where its run is kept, unless somebody says otherwise."""
        names = [self.scenario.name, *([self.target.name] if self.in_turn else []), str(self.scenario.seed)]
        return Path("runs") / "-".join(names)

    def remarks(self) -> list[str]:
        """What is left out of the images, by site, what differs between sites, and classes that nobody shows, as seen from here."""
        everyone = [*self.sites, self.target]
        protocol = self.scenario.protocol
        said = [f"protocol '{protocol}' gives: {', '.join(self.filled)}"] if protocol and self.filled else []
        said += try_out(self.scenario.model, len(self.classes))
        said += unusable() if self.scenario.backend != "deployment" else []
        for name, done in brought_by(self.scenario, self.sites, self.classes).items():
            said.append(f"site '{name}' brings its expert, and trains none: {'; '.join(done) or 'taken as it is'}")
        said += [f"site '{site.name}': {remark}" for site in everyone for remark in site.source.remarks()]
        shown = [site.source.shown() for site in everyone]
        nobody = [name for name in self.classes if all(those is not None and name not in those for those in shown)]
        said += shown_otherwise(everyone) + copied(everyone, self.scenario.events)
        said += of_two_sites(everyone, self.target.name, self.scenario.events)
        return said + ([f"classes that no site has an image of: {', '.join(nobody)}"] if nobody else [])

    def resolved(self) -> dict[str, Any]:
        """All that was asked for, with every default written out. joining: sites that only events name, if there are any."""
        sites = [_written(site) for site in self.sites]
        scenario = self.scenario.model_dump(mode="json")
        founders, joining = sites[: len(self.scenario.sites)], sites[len(self.scenario.sites) :]
        given = {"classes": list(self.target_classes)} if self.scenario.target.classes else {}
        return {
            **{key: value for key, value in scenario.items() if key != "protocol" or value},
            "sites": founders,
            **({"joining": joining} if joining else {}),
            "target": {**_written(self.target), **self.scenario.target.limits, **given},
        }

    def inputs(self) -> dict[str, str]:
        """A sha256 of every input that the scenario only names: all images, and the files of weights that can be read."""
        scenario = self.scenario
        start = scenario.initialization
        found = {f"site {site.name}": site.source.identity(site.name, scenario.seed) for site in (*self.sites, self.target)}
        public = {"initialization": getattr(start, "source", None), "probe": scenario.probe}
        found |= {key: source.identity(PUBLIC, scenario.seed) for key, source in public.items() if source}
        files = {"initialization": getattr(start, "path", None), "generalist": scenario.generalist}
        files["model"] = getattr(scenario.model, "weights", None)
        found |= {f"expert of {site.name}": site.expert.digest for site in self.sites if site.expert}
        return found | {key: digest for key, path in files.items() if path and (digest := file_digest(at_home(path)))}

    def sha256(self) -> str:
        """Digest of the resolved scenario, without what does not change a result."""
        determined = {key: value for key, value in self.resolved().items() if key not in WITHOUT_EFFECT}
        return hashlib.sha256(json.dumps(determined, sort_keys=True).encode()).hexdigest()


LATER = ("expert", "disagreements")
"""Keys of a site that older versions did not know."""


def _written(site: Site) -> dict[str, Any]:
    """A site's keys; of what was not there once, only what is given, so that runs of older versions stay the same."""
    return {key: value for key, value in site.model_dump(mode="json").items() if key not in LATER or value}


def load_experiment(path: Path, overrides: Overrides | None = None, at_target: bool = True) -> Experiment:
    """Read and check a scenario with its sites. Raises ScenarioError with all problems at once.

    at_target: the target's part will be done on this machine, so what only that needs must be there.
    """
    given = read_yaml(path)
    content = overridden(given, overrides or Overrides())

    def same(key: str) -> bool:
        (mine, lacking), (changed, still) = value_at(given, key), value_at(content, key)
        of_all = mine is given and changed is content  # of no single key, or of one that neither has
        return lacking == still and (of_all or bool(mine == changed))

    with lines_named(path, same):
        names = filled(content)[1] + (["methods"] if "methods" not in given and not (overrides and overrides.methods) else [])
        return replace(_checked(content, path, at_target), in_turn=target_named(given) == EACH, filled=tuple(names))


def load_each(path: Path, overrides: Overrides) -> list[Experiment]:
    """The experiments of a scenario: one, or one for each domain where the target is `each`. Raises ScenarioError."""
    own = replace(overrides, target=None) if overrides.target == EACH else overrides
    content = overridden(read_yaml(path), own)
    if EACH not in (target_named(content), overrides.target):
        return [load_experiment(path, overrides)]
    with lines_named(path):
        domains = domains_in_turn(content, str(path))
    return [load_experiment(path, replace(own, target=name, add_sites=(*own.add_sites, *trains))) for name, trains in domains]


def _checked(content: dict[str, Any], path: Path, at_target: bool) -> Experiment:
    """The experiment of a scenario that is read and overridden. Raises ScenarioError with all problems at once."""
    problems: list[Problem] = []
    scenario: Scenario | None = None
    try:
        scenario = check(Scenario, content, str(path))
    except ScenarioError as error:
        problems += error.problems
    names, target_name = _strings(content.get("sites")), target_named(content)
    if target_name == EACH:
        problems += one_of_each(str(path), names)
        target_name = None
    if target_name == "":
        problems.append(Problem(str(path), "target", "an empty name", "the hospital at which models are merged"))
    joining = _joining(content.get("events"), names)
    sites = {name: _read_site(name, path, problems) for name in dict.fromkeys([*names, *joining])}
    target = _read_site(target_name, path, problems) if target_name else None
    found = [site for site in sites.values() if site]
    problems += name_problems(str(path), names, joining, target_name)
    everyone, reads_text = found + ([target] if target else []), bool(scenario and scenario.model.reads_text)
    apart = (everyone if scenario and scenario.has_tasks else [target] if target else []) if reads_text else []
    problems += agreement_problems(everyone, scenario.events if scenario else (), apart)
    problems += event_problems(str(path), scenario, [Path(name).stem for name in names]) if scenario else []
    problems += public_problems(str(path), scenario) if scenario else []
    if scenario and target:
        channels = scenario.model.geometry.channels
        in_stream = scenario.stream.check(target.source.domains()) + mismatched(scenario.stream.conditions(), channels, "families")
        problems += [placed(str(path), "stream", problem) for problem in in_stream]
        problems += [placed(f"site '{s.name}'", "", p) for s in [*found, target] for p in mismatched(s.shifts, channels, "shifts")]
        problems += method_problems(str(path), scenario, [site.name for site in found], [*found, target])
        problems += untrained(str(path), scenario, found) + without_theta_0(str(path), scenario, found)
        problems += unprotected(str(path), scenario, found) + unfit(str(path), scenario, len(names), len(joining))
        problems += of_one_name(str(path), scenario, list(dict.fromkeys(site.name for site in found)))
        problems += generalist_nowhere(str(path), scenario) if at_target else []
        problems += prior_problems(str(path), scenario, target)
        problems += start_nowhere(str(path), scenario)
        problems += class_problems(str(path), scenario, found, target)
    if problems or scenario is None or target is None:
        raise ScenarioError(once(problems))
    classes = tuple(dict.fromkeys(name for site in found for name in scenario.trains_on(site)))
    seen = seen_by(scenario, found, target)
    try:
        try_out(scenario.model, len(classes))
    except ScenarioError as error:  # a model does not know the file that it stands in
        raise ScenarioError([replace(problem, where=str(path)) for problem in error.problems]) from None
    if problems := biasless(str(path), scenario, len(classes)) + unmeasurable(str(path), scenario, len(classes)):
        raise ScenarioError(problems)
    brought_by(scenario, found, classes)
    return Experiment(scenario, tuple(found), target, classes, seen)


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _joining(events: Any, founders: list[str]) -> list[str]:
    """Sites that only events name, each once, in the order in which they arrive."""
    entries = [event for event in events if isinstance(event, dict)] if isinstance(events, list) else []
    entries.sort(key=lambda event: event["at"] if isinstance(event.get("at"), int) else 0)
    given = {Path(name).stem: name for name in reversed(_strings([e.get("join") or e.get("by") for e in entries]))}
    arriving = [Path(name).stem for name in _strings([event.get("join") or event.get("by") for event in entries])]
    known = {Path(name).stem for name in founders}
    return [given[stem] for stem in dict.fromkeys(arriving) if stem not in known]


def site_file(name: str, scenario: Path) -> Path:
    """Where a site's YAML is: a path as given, else `sites/` beside the scenario's folder, in it, or in this folder."""
    if name.endswith((".yaml", ".yml")):
        given = Path(name)
        return given if given.is_absolute() or is_there(given) else scenario.parent / given
    folders = [scenario.resolve().parent.parent / "sites", scenario.resolve().parent / "sites", Path("sites")]
    candidates = [folder / f"{name}.yaml" for folder in folders]
    return next((item for item in candidates if is_there(item)), candidates[0])


def _read_site(name: str, scenario: Path, problems: list[Problem]) -> Site | None:
    file = site_file(name, scenario)
    try:
        site = read_as(Site, file)
    except ScenarioError as error:
        problems += error.problems
        return None
    if site.name != file.stem:
        wrong_name = Problem(str(file), "name", f"'{site.name}'", f"'{file.stem}', the name of the file")
        problems += lined([wrong_name], file)
    wrong = lined([placed(str(file), "source", problem) for problem in site.source.check()], file)
    problems += wrong
    return None if wrong else site
