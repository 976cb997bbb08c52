"""What training starts from, and who trains: theta_0, experts that sites bring, privacy, rounds, the generalist."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import lru_cache

import torch

from fedmerge.errors import CheckpointError, Problem, nearest
from fedmerge.experiment.scenario import Scenario
from fedmerge.experiment.validation.problems import placed
from fedmerge.federated.attacks._base import Attack
from fedmerge.federated.model import build, model_of_json
from fedmerge.federated.pool.checkpoint import fitting
from fedmerge.federated.site import OwnExpert, Site
from fedmerge.federated.statistics._base import Statistic


def unprotected(where: str, scenario: Scenario, sites: Sequence[Site]) -> list[Problem]:
    """What would leave hospitals without noise, or what noised uploads lack, where the scenario asks for privacy."""
    if scenario.privacy is None:
        return []
    problems, one = [], "Remove the one or the other"
    if scenario.uploads:
        kinds = ", ".join(statistic.kind() for statistic in scenario.uploads)
        problems.append(Problem(where, "uploads", kinds, "no uploads with 'privacy'", f"Statistics carry no noise. {one}"))
    if scenario.federated:
        kinds = ", ".join(strategy.key for strategy in scenario.federated)
        problems.append(Problem(where, "federated", kinds, "no rounds with 'privacy'", f"Models of rounds carry no noise. {one}"))
    if scenario.initialization and scenario.initialization.head_init == "fed_lp":
        problems.append(
            Problem(
                where, "initialization.head_init", "'fed_lp'", "another start with 'privacy'", f"Its heads carry no noise. {one}"
            )
        )
    problems += [
        Problem(
            where,
            f"methods[{number}]",
            f"'{method.key}', which needs the number of images of each hospital",
            "a method without that need: hospitals with 'privacy' do not tell it",
            one,
        )
        for number, method in enumerate(scenario.methods)
        if "counts" in method.needed
    ]
    shown = [site for site in sites if site.samples]
    return problems + [
        Problem(f"site '{site.name}'", "samples", str(site.samples), "0 with 'privacy'", "Sample images carry no noise")
        for site in shown
    ]


def untrained(where: str, scenario: Scenario, sites: Sequence[Site]) -> list[Problem]:
    """What asks a hospital to train that brings its expert."""
    brings, problems = [site.name for site in sites if site.expert], list[Problem]()
    for site in sites:
        if site.expert and site.attack and type(site.attack).tamper is Attack.tamper:
            found = f"'{site.attack.kind()}', which acts during training, at a site that brings its expert"
            mend = "Remove 'expert', or take an attack on weights, such as scale_head"
            problems.append(Problem(f"site '{site.name}'", "attack", found, "an attack that acts on finished weights", mend))
    if brings:
        who, mend = f"site '{brings[0]}' brings its expert and does not train", "Remove the site, or its 'expert'"
        problems += [
            Problem(where, f"federated[{number}]", f"'{strategy.key}', but {who}", "sites that all train in rounds", mend)
            for number, strategy in enumerate(scenario.federated)
        ]
        if scenario.initialization and scenario.initialization.head_init == "fed_lp":
            found = f"'fed_lp', but {who}"
            problems.append(Problem(where, "initialization.head_init", found, "sites that all train a first head", mend))
    return problems


def without_theta_0(where: str, scenario: Scenario, sites: Sequence[Site]) -> list[Problem]:
    """What starts from theta_0, or is measured from it, where a scenario has none."""
    if scenario.initialization is not None:
        return []
    trains, mend = [site.name for site in sites if not site.expert], "Or add the key 'initialization', which says what theta_0 is"
    problems = []
    if trains:
        found = f"nothing, but site '{trains[0]}' starts its training from it"
        problems.append(
            Problem(where, "initialization", found, "a value", "Only where all sites bring an 'expert' may it be left out")
        )
    problems += [
        Problem(where, f"methods[{number}]", f"'{method.key}', which needs theta_0", "a method that needs no theta_0", mend)
        for number, method in enumerate(scenario.methods)
        if "theta_0" in method.needed or method.with_theta_0
    ]
    problems += [
        Problem(where, "uploads", f"'{statistic.kind()}', which is measured by theta_0", "statistics that need none", mend)
        for statistic in scenario.uploads
        if statistic.needs_theta_0
    ]
    if scenario.privacy:
        problems.append(
            Problem(where, "privacy", "'privacy', which clips changes from theta_0, but no theta_0", "no 'privacy'", mend)
        )
    if (scenario.target.shards or 1) > 1:
        problems.append(Problem(where, "target.shards", str(scenario.target.shards), "1 without theta_0", mend))
    return problems


def brought_by(scenario: Scenario, sites: Sequence[Site], classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What is done to the expert that each site brings, in words, as far as its file is here.

    Raises CheckpointError with every file that does not fit the model, or is of no use here.
    """
    found, wrong = {}, []
    for site in sites:
        if site.expert and site.expert.checkpoint:
            said = _fit(site.name, site.expert, site.expert.digest, scenario.model.model_dump_json(), tuple(classes))
            if isinstance(said, str):
                wrong.append(said)
            else:
                found[site.name] = said
    if wrong:
        raise CheckpointError("\n".join(wrong))
    return found


@lru_cache(maxsize=256)
def _fit(name: str, expert: OwnExpert, digest: str, model: str, classes: tuple[str, ...]) -> tuple[str, ...] | str:
    """What is done to a file, or why it does not fit. digest: its contents, which may change."""
    try:
        skeleton = build(model_of_json(model), len(classes))
        return fitting(f"site '{name}'", expert, skeleton, classes).done
    except CheckpointError as error:
        return str(error)


def unfit(where: str, scenario: Scenario, founders: int, joining: int) -> list[Problem]:
    """Federated strategies that could not be run among so many hospitals. joining: others, which come too late for the rounds."""
    enough = scenario.min_sites - joining if scenario.min_sites else founders  # if all others are there
    fewest = max(1, min(founders, enough))  # the run goes on with so few, and their rounds must be possible
    as_few = " (the fewest that min_sites allows)" if fewest < founders else ""
    problems = []
    for number, strategy in enumerate(scenario.federated):
        at, key = f"federated[{number}]", strategy.key
        asked = strategy.chosen(fewest)
        if asked < 1:
            found = f"{strategy.fraction:g}, which selects no hospital of {fewest}{as_few}"
            problems.append(Problem(where, f"{at}.fraction", found, f"at least {1 / fewest:.3g}"))
        elif asked < strategy.least:
            found = f"'{key}', which would have {asked} hospitals in a round{as_few}"
            problems.append(Problem(where, at, found, f"at least {strategy.least} hospitals in each round"))
    return problems


def unmeasurable(where: str, scenario: Scenario, classes: int) -> list[Problem]:
    """Strategies whose hospitals could not measure what they have to send beside weights. The model can be built."""
    asked = [(number, strategy, one) for number, strategy in enumerate(scenario.federated) for one in strategy.statistics]
    asked = [(number, strategy, one) for number, strategy, one in asked if type(one).unfit is not Statistic.unfit]
    if not asked:
        return []
    side, channels = scenario.model.geometry
    model, image = build(scenario.model, classes).eval(), torch.zeros(1, channels, side, side)
    return [
        Problem(
            where, f"federated[{number}]", f"'{strategy.key}', and {why}", "a strategy without that", "Take information: diagonal"
        )
        for number, strategy, one in asked
        if (why := one.unfit(model, image))
    ]


def public_problems(where: str, scenario: Scenario) -> list[Problem]:
    """Public images that cannot be used: of the proxy, and of the checks."""
    sources = {"initialization.source": getattr(scenario.initialization, "source", None), "probe": scenario.probe}
    return [placed(where, key, problem) for key, source in sources.items() if source for problem in source.check()]


def generalist_nowhere(where: str, scenario: Scenario) -> list[Problem]:
    """A generalist that is neither a row of `federated` nor a file that is there."""
    given, keys = scenario.generalist, [strategy.key for strategy in scenario.federated]
    if given is None or str(given) in keys or given.is_file():
        return []
    found = f"'{given}', which is a folder" if given.is_dir() else f"'{given}', which does not exist"
    rows = f", or a row of 'federated': {', '.join(keys)}" if keys else ""
    hint = nearest(str(given), keys) if keys else ""
    return [Problem(where, "generalist", found, f"a safetensors file{rows}", hint if hint.endswith("?") else "")]


def start_nowhere(where: str, scenario: Scenario) -> list[Problem]:
    """A file of theta_0 whose place is in an environment variable that is not set."""
    given = getattr(scenario.initialization, "path", None) or getattr(scenario.initialization, "cache", None) or ""
    key = "path" if hasattr(scenario.initialization, "path") else "cache"
    unset = re.search(r"\$\{?(\w+)\}?", os.path.expandvars(given))
    if not unset:
        return []
    expected = "a file of weights" if key == "path" else "a folder"
    mend = f"Set {unset[1]}, e.g. export {unset[1]}=/path/to/weights.pth" if key == "path" else f"Set {unset[1]}"
    return [Problem(where, f"initialization.{key}", f"'{given}', but {unset[1]} is not set", expected, mend)]
