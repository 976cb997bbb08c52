"""What a scenario and its sites say that does not fit together: each function gives the problems of one kind."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

from fedmerge.errors import CheckpointError, Problem, difference, folded, nearest, quoted
from fedmerge.experiment.scenario import Scenario
from fedmerge.federated.attacks._base import Attack
from fedmerge.federated.model import ClipSpec, build, model_of_json
from fedmerge.federated.pool.checkpoint import fitting
from fedmerge.federated.site import OwnExpert, Site
from fedmerge.federated.statistics._base import STATISTICS
from fedmerge.merging.methods._base import Method
from fedmerge.merging.prior import head_bias
from fedmerge.stream.events import Event, inconsistent


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


def unfit(where: str, scenario: Scenario, founders: int) -> list[Problem]:
    """Federated strategies that could not be run among so many hospitals."""
    fewest = min(founders, scenario.min_sites or founders)  # the run goes on with so few, and their rounds must be possible
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


def placed(where: str, key: str, problem: Problem) -> Problem:
    inner = ".".join(part for part in (key, problem.key) if part)
    return Problem(where, inner, problem.found, problem.expected, problem.mend)


def name_problems(where: str, names: list[str], joining: list[str], target: str | None) -> list[Problem]:
    stems = [Path(name).stem for name in names]
    problems = [
        Problem(where, "sites", f"'{stem}' {stems.count(stem)} times", "every site once")
        for stem in dict.fromkeys(stems)
        if stems.count(stem) > 1
    ]
    if target and Path(target).stem in [*stems, *(Path(name).stem for name in joining)]:
        expected = "a hospital that is not among the sites, so that no expert has trained on its images"
        mend = f"Use the option '--target {target}', which removes it from the sites" if Path(target).stem in stems else ""
        problems.append(Problem(where, "target", f"'{target}', which is also one of the sites", expected, mend))
    return problems


def one_of_each(where: str, names: list[str]) -> list[Problem]:
    """A target that stands for all domains, where one is needed."""
    known = ", ".join(Path(name).stem for name in names)
    mend = f"Name it with --target (one of: {known}), or run all in turn: fedmerge sweep {where}"
    return [Problem(where, "target", "'each', which stands for every site in turn", "one site for one run", mend)]


def event_problems(where: str, scenario: Scenario, founders: list[str]) -> list[Problem]:
    """Who comes and goes must be able to; how long the stream is, nobody knows before the target's images are there."""
    problems = [placed(where, "", problem) for problem in inconsistent(founders, scenario.events)]
    total = len({*founders, *(event.arrives for event in scenario.events if event.arrives)})
    if scenario.min_sites and scenario.min_sites > total:
        problems.append(Problem(where, "min_sites", str(scenario.min_sites), f"at most {total}, the number of sites"))
    for statistic in scenario.uploads if scenario.events else ():
        if statistic.starts_from == "rounds":
            found = f"'{statistic.kind()}', which is made in rounds with all experts, and 'events', which change the experts"
            expected = "one of the two"
            mend = f"Remove 'events', or '{statistic.kind()}' and the methods that need it"
            problems.append(Problem(where, "uploads", found, expected, mend))
    return problems


def agreement_problems(sites: list[Site], events: tuple[Event, ...], apart: Sequence[Site] = ()) -> list[Problem]:
    """Sites must have the same classes in the same order, and no image in common, but with whom they replace.

    apart: those that may have classes of their own.
    """
    problems = _other_classes([site for site in sites if site not in apart])
    held = [(site.name, site.source.holdings(site.name)) for site in sites]
    for index, earlier in _sharing([items or () for _, items in held]):
        (name, items), (other, theirs) = held[index], held[earlier]
        if name == other or _renewed(name, other, events) or not items or not theirs:
            continue
        shared = items.keys() & theirs.keys()
        one, twin = min((items[key], theirs[key]) for key in shared)
        led = "" if one == twin else f", which is {twin}"
        found = f"{len(shared)} images that site '{other}' has too, e.g. {one}{led}"
        mend = "Give them different domains, or different parts of one split"
        problems.append(Problem(f"site '{name}'", "source", found, "images that no other site has", mend))
    return problems


def _sharing(held: Sequence[Iterable[Hashable]]) -> list[tuple[int, int]]:
    """Who has an item in common with whom before it, by number: without a look at every pair, of which there are too many."""
    owners: dict[Hashable, list[int]] = {}
    for number, items in enumerate(held):
        for item in items:
            owners.setdefault(item, []).append(number)
    return sorted({(later, earlier) for those in owners.values() for earlier, later in combinations(those, 2)})


def _renewed(name: str, other: str, events: tuple[Event, ...]) -> bool:
    return any({event.departs, event.arrives} == {name, other} for event in events)


def copied(sites: Sequence[Site], events: tuple[Event, ...]) -> list[str]:
    """Lines about files of the same content at two sites. Blank slices are alike by chance, so it is told, and not refused."""
    said = []
    held = [(site.name, site.source.contents(site.name)) for site in sites]
    for index, earlier in _sharing([items for _, items in held]):
        (name, items), (other, theirs) = held[index], held[earlier]
        if name != other and not _renewed(name, other, events):
            said.append(f"sites '{other}' and '{name}' have {len(items & theirs)} files with the same content")
    return said


def of_two_sites(sites: Sequence[Site], target: str, events: tuple[Event, ...]) -> list[str]:
    """Lines about patients at two sites, by digests that the sites make; and where that cannot be told."""
    found = {site.name: site.source.pseudonyms() for site in sites}
    said, agreed = [], dict[Hashable, set[str]]()
    for name, mine in found.items():
        if mine is not None:
            agreed.setdefault(mine.secret, set()).add(name)
    compared = {name for names in agreed.values() if len(names) > 1 for name in names}
    known = [(name, mine) for name, mine in ((site.name, found[site.name]) for site in sites) if mine is not None]
    for index, earlier in _sharing([[(mine.secret, patient) for patient in mine.patients] for _, mine in known]):
        (name, mine), (other, theirs) = known[index], known[earlier]
        if name != other and not _renewed(name, other, events):
            seen = f", so the target '{target}' is not unseen for these patients" if target in (name, other) else ""
            said.append(f"sites '{other}' and '{name}' have {len(mine.patients & theirs.patients)} patients in common{seen}")
    files = [site for site in sites if "patient_key" in type(site.source).model_fields]
    left = [site.name for site in files if site.name not in compared]
    if len(files) > 1 and left and any(site.source.knows_patients for site in files):
        each = ", ".join(dict.fromkeys(left))
        said.append(f"sites {each}: nobody can tell whether their patients are at other sites too, without a common patient_key")
    return said


def _other_classes(sites: list[Site]) -> list[Problem]:
    """Sites whose classes are not those that most have. Names that only look the same are told from those that are not there."""
    classes = {site.name: site.source.classes() for site in sites}
    usual = Counter(classes.values()).most_common(1)[0][0] if classes else ()
    problems = []
    for site in sites:
        here = classes[site.name]
        if here == usual:
            continue
        other = next(name for name in classes if classes[name] == usual)
        missing, extra = sorted(set(usual) - set(here)), sorted(set(here) - set(usual))
        written = {folded(name): name for name in missing}
        same = [(name, written[folded(name)]) for name in extra if folded(name) in written]
        found = f"classes {', '.join(here)}" if not (missing or extra) else f"missing {_listed(missing)}, extra {_listed(extra)}"
        mend = [
            f"Rename {quoted(name)} to {quoted(theirs)}, as '{other}' calls it: the names differ in {difference(name, theirs)} only"
            for name, theirs in same
        ]
        if lacking := [name for name in missing if name not in dict(same).values()]:
            mend.append(site.source.how_to_add(lacking))
        elif len(extra) > len(same):
            mend.append("If these classes are right, add them to the other sites too; a class may have no image")
        mend += [f"They are: {', '.join(usual)}"]
        problems.append(Problem(f"site '{site.name}'", "source", found, f"the classes of '{other}'", ". ".join(filter(None, mend))))
    return problems


def class_problems(where: str, scenario: Scenario, sites: Sequence[Site], target: Site) -> list[Problem]:
    """Classes of hospitals and target, which may differ where a model reads prompts, and the prompts."""
    model, start = scenario.model, scenario.initialization
    if not isinstance(model, ClipSpec):
        return _only_for_prompts(where, scenario)
    problems = _named_classes(where, scenario, sites, target)
    trained = tuple(dict.fromkeys(name for site in sites for name in scenario.trains_on(site)))
    asked = seen_by(scenario, sites, target)
    public = getattr(start, "source", None)
    needed = dict.fromkeys([*sorted(trained), *asked, *(public.classes() if public else ())])
    sources = [site.source for site in (*sites, target)] + ([public] if public else [])
    known = dict.fromkeys(name for source in sources for name in source.classes())
    problems += _prompt_problems(where, model, [name for name in needed if name in known], [*known])
    problems += _start_problems(where, model, scenario)
    if start is None and set(asked) != set(trained):
        expected = f"those of the hospitals, {_listed(sorted(trained))}, or the key 'initialization'"
        mend = "Without it there is no text tower to make a head for other classes"
        problems.append(Problem(where, "target.classes", _listed(asked), expected, mend))
    tasks = {frozenset(scenario.trains_on(site)) for site in sites}
    if len(tasks) > 1 and not model.fixed_head:
        mend = "Hospitals have classes of their own, and a merge of trained heads has rows that one of them alone has trained"
        return [*problems, Problem(where, "model.head", f"'{model.head}'", "'text'", mend)]
    novel = [name for name in asked if name not in trained]
    if novel and not model.fixed_head:
        expected, mend = "an untrained head, which can name new classes", "Say 'model.head: text'"
        problems += [
            Problem(where, f"methods[{number}]", f"'{method.key}' and the new classes {', '.join(novel)}", expected, mend)
            for number, method in enumerate(scenario.methods)
        ]
    elif asked != trained and not model.fixed_head:
        expected = f"{_listed(trained)}, in this order: rows of trained heads are the hospitals' classes. Or say 'model.head: text'"
        problems.append(Problem(where, "target.classes", _listed(asked), expected))
    return problems


def seen_by(scenario: Scenario, sites: Sequence[Site], target: Site) -> tuple[str, ...]:
    """The target's classes: as given, those of the hospital that is named, or all of its images'."""
    given = scenario.target.classes
    if isinstance(given, str):
        return next((scenario.trains_on(site) for site in sites if site.name == given), ())
    found: tuple[str, ...] = given or target.source.classes()
    return found


def _only_for_prompts(where: str, scenario: Scenario) -> list[Problem]:
    """Keys that a model of timm has no use for."""
    given = {"classes": scenario.classes, "target.classes": scenario.target.classes}
    expected = "no such key with a model of timm, which predicts the classes that it was trained on"
    mend = "Remove the key, or use a CLIP (model: {kind: clip}), whose prompts name other classes"
    found = [Problem(where, key, _listed(names), expected, mend) for key, names in given.items() if names]
    if getattr(scenario.initialization, "captions", None):
        found.append(
            Problem(where, "initialization.captions", "captions", "none with a model of timm", "Only a CLIP reads captions")
        )
    if getattr(scenario.initialization, "head_init", None) == "text":
        key, mend = "initialization.head_init", "Only a CLIP has prompts to make a head from"
        found.append(Problem(where, key, "'text'", "another value with a model of timm", mend))
    return found


def _named_classes(where: str, scenario: Scenario, sites: Sequence[Site], target: Site) -> list[Problem]:
    """Classes and hospitals that are named, and are not there; classes that are named twice."""
    given: list[tuple[str, Sequence[str], Sequence[Site]]] = []
    names, problems = [site.name for site in sites], list[Problem]()
    if isinstance(scenario.classes, dict):
        given += [(f"classes.{site.name}", scenario.classes[site.name], [site]) for site in sites if site.name in scenario.classes]
        meant = {*names, *(Path(name).stem for name in scenario.sites)}  # a file that cannot be read is another problem
        unknown = [name for name in scenario.classes if name not in meant]
        problems += [Problem(where, f"classes.{one}", f"'{one}'", "a site of the scenario", nearest(one, names)) for one in unknown]
        lacking = [name for name in names if name not in scenario.classes]
        problems += [Problem(where, "classes", f"no classes of '{one}'", "those of every site that trains") for one in lacking]
    elif isinstance(scenario.classes, tuple):
        given.append(("classes", scenario.classes, sites))
    asked = scenario.target.classes
    if isinstance(asked, str):
        if asked not in names:
            expected = "a list of classes, or a site of the scenario, whose classes they are"
            problems.append(Problem(where, "target.classes", f"'{asked}'", expected, nearest(asked, names)))
        asked = seen_by(scenario, sites, target)
    given.append(("target.classes", asked or (), [target]))
    for key, classes, owners in given:
        there = [site.source.classes() for site in owners]
        for name in dict.fromkeys(classes):
            if any(name not in known for known in there):
                least = min(there, key=lambda known: name in known)
                problems.append(Problem(where, key, f"'{name}'", "a class of the images", nearest(name, least)))
        twice = [name for name in dict.fromkeys(classes) if classes.count(name) > 1]
        problems += [Problem(where, key, f"'{name}' twice", "every class once") for name in twice]
    return problems


def _prompt_problems(where: str, model: ClipSpec, needed: Sequence[str], known: Sequence[str]) -> list[Problem]:
    """A class without a word, and a word without its class. needed: classes of prompts. known: of all images."""
    lacking = [name for name in needed if name not in model.words]
    problems = []
    if lacking:
        example = f"{lacking[0]}: {lacking[0].replace('-', ' ').replace('_', ' ')}"
        found = f"no word for {', '.join(quoted(name) for name in lacking)}"
        problems.append(Problem(where, "model.words", found, "one for each class, for its prompts", f"Add, e.g., '{example}'"))
    for name in model.words:
        if name not in known:
            problems.append(Problem(where, f"model.words.{name}", f"'{name}'", "the name of a class", nearest(name, known)))
    return problems


def _start_problems(where: str, model: ClipSpec, scenario: Scenario) -> list[Problem]:
    """Where a CLIP's weights come from, and what its head is: each said once."""
    start, problems = scenario.initialization, list[Problem]()
    if start is None:
        return problems
    if start.kind == "pretrained" and not model.weights:
        expected = "a file or a tag of open_clip, or 'initialization' with a checkpoint or a proxy"
        problems.append(Problem(where, "model.weights", "nothing", expected))
    if start.kind != "pretrained" and model.weights:
        found = f"weights beside initialization: {{kind: {start.kind}}}"
        problems.append(
            Problem(where, "model.weights", found, "one of the two", "Remove 'model.weights', or say 'kind: pretrained'")
        )
    if start.head_init != "text":
        mend = "Leave it out: a CLIP's head is made from its prompts, and 'model.head' says whether it is trained"
        problems.append(Problem(where, "initialization.head_init", f"'{start.head_init}'", "'text' with a CLIP", mend))
    return problems


def _listed(names: Any) -> str:
    """Names as YAML has them."""
    if isinstance(names, str):
        return quoted(names)
    if isinstance(names, dict):
        return f"{{{', '.join(f'{key}: {_listed(inner)}' for key, inner in names.items())}}}"
    return f"[{', '.join(quoted(name) for name in names)}]"


def once(problems: Sequence[Problem]) -> list[Problem]:
    """What is wrong with a folder of images that several sites share, once: their files are named by the first."""
    places: dict[Problem, list[str]] = {}
    for problem in problems:
        shared = problem.key.startswith("source.")
        places.setdefault(replace(problem, where="") if shared else problem, []).append(problem.where)
    found = []
    for problem, where in places.items():
        more = len(set(where)) - 1
        found.append(replace(problem, where=where[0] + (f" (and {more} more file{'s' if more > 1 else ''})" if more else "")))
    return found


def public_problems(where: str, scenario: Scenario) -> list[Problem]:
    """Public images that cannot be used: of the proxy, and of the checks."""
    sources = {"initialization.source": getattr(scenario.initialization, "source", None), "probe": scenario.probe}
    return [placed(where, key, problem) for key, source in sources.items() if source for problem in source.check()]


def method_problems(where: str, scenario: Scenario, names: list[str], sites: list[Site]) -> list[Problem]:
    kinds = [statistic.kind() for statistic in scenario.uploads]
    problems = [
        Problem(where, "uploads", f"'{kind}' {kinds.count(kind)} times", "every statistic once")
        for kind in dict.fromkeys(kinds)
        if kinds.count(kind) > 1
    ]
    for number, method in enumerate(scenario.methods):
        at = f"methods[{number}]"
        problems += _needs(where, at, method, scenario)
        site = getattr(method, "site", None)
        if site is not None and site not in names:
            problems.append(Problem(where, f"{at}.site", f"'{site}'", "a site of the scenario", nearest(site, names)))
        if "hflip" in getattr(method, "augs", ()) and not all(item.source.flips for item in sites):
            mend = "Use 'shift' instead: here a flip turns a left organ into a right one"
            problems.append(Problem(where, f"{at}.augs", "'hflip'", "views that preserve the label", mend))
    return problems


def _needs(where: str, at: str, method: Method, scenario: Scenario) -> list[Problem]:
    """What a method needs from sites must be among the uploads, and computed as the method wants it."""
    problems = []
    uploads = {statistic.kind(): statistic for statistic in scenario.uploads}
    for kind in sorted(method.needed & set(STATISTICS.names)):
        if kind not in uploads:
            found = f"'{method.key}', which needs the statistic '{kind}' of every site"
            expected = f"'{kind}' among the scenario's uploads"
            mend = f"Add the line 'uploads: [{', '.join([*uploads, kind])}]', or leave the method out"
            problems.append(Problem(where, at, found, expected, mend))
            continue
        basis = method.built_on
        place = at if basis is method else f"{at}.{method.kind()}.of.{basis.kind()}"
        for field in sorted({"ratio", "ridge"} & set(type(uploads[kind]).model_fields)):
            here, there = getattr(basis, field), getattr(uploads[kind], field)
            if here != there:
                mend = f"Give both the same value: the server merges with that of uploads.{kind} between rounds"
                problems.append(Problem(where, f"{place}.{field}", str(here), f"{there}, as in uploads.{kind}", mend))
    lacks = sorted(method.needed & {*STATISTICS.names, "counts", "theta_0"}) if method.with_theta_0 else []
    if lacks or (method.with_theta_0 and (scenario.target.shards or 1) > 1):
        why = (
            f"The start, theta_0, has no {lacks[0]}, which the method needs of every expert" if lacks else "No shard holds theta_0"
        )
        why = "The method starts from theta_0 already" if "theta_0" in lacks else why
        problems.append(Problem(where, f"{at}.{method.kind()}.with_theta_0", "true", "false", why))
    if "generalist" in method.needed and scenario.generalist is None:
        found, expected = f"'{method.key}', which needs a generalist, and no key 'generalist'", "that key in the scenario"
        mend = "Its value is the path of a safetensors file, or the name of a federated model"
        problems.append(Problem(where, at, found, expected, mend))
    return problems


def prior_problems(where: str, scenario: Scenario, target: Site) -> list[Problem]:
    """What `priors` needs of hospitals and of the target."""
    if scenario.priors == "as_trained":
        return []
    classes = target.source.classes()
    problems, key = [], f"'{scenario.priors}'"
    kinds = [statistic.kind() for statistic in scenario.uploads]
    if "class_counts" not in kinds:
        mend = f"Add the line 'uploads: [{', '.join([*kinds, 'class_counts'])}]'"
        expected = "'class_counts' among the uploads, by which hospitals tell how common each class is"
        problems.append(Problem(where, "priors", key, expected, mend))
    if scenario.priors == "declared" and set(target.prevalences or ()) != set(classes):
        given = target.prevalences
        found = "no prevalences" if given is None else f"prevalences of {_listed(sorted(given))}"
        expected = f"one for each class: {', '.join(classes)}"
        problems.append(
            Problem(f"site '{target.name}'", "prevalences", f"{found}, but 'priors: declared' in the scenario", expected)
        )
    return problems


def biasless(where: str, scenario: Scenario, classes: int) -> list[Problem]:
    """A model whose head can hold no prior, where `priors` would change it. The model can be built."""
    if scenario.priors == "as_trained":
        return []
    try:
        head_bias(build(scenario.model, classes))
    except CheckpointError:
        found = f"'{scenario.priors}', and a model whose classifier has no bias to hold a prior"
        return [Problem(where, "priors", found, "'as_trained' with this model")]
    return []


def of_one_name(where: str, scenario: Scenario, sites: Sequence[str]) -> list[Problem]:
    """Entries whose rows have one name: the later would stand in the place of the earlier without a word.

    sites: all that have an expert at some time, since an entry may stand for a row of each.
    """
    entries: dict[str, list[str]] = {}
    for number, method in enumerate(scenario.methods):
        for row in method.expand(tuple(sites)) or (method,):
            entries.setdefault(row.key, []).append(f"methods[{number}]")
    for number, strategy in enumerate(scenario.federated):
        entries.setdefault(strategy.key, []).append(f"federated[{number}]")
    same: dict[tuple[str, ...], str] = {}
    for name, those in entries.items():
        if len(those) > 1:
            same.setdefault(tuple(those), name)  # two entries of a row for each site are one mistake
    return [
        Problem(
            where,
            those[-1],
            f"the name '{name}' {len(those)} times ({', '.join(those)})",
            "a name of its own for each row",
            "Give one a 'label'",
        )
        for those, name in same.items()
    ]


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


def shown_otherwise(sites: Sequence[Site]) -> list[str]:
    """Remarks on keys for the values of image files that differ between sites: the same values are then not the same pixels."""
    said: list[str] = []
    for key in ("gray_range", "range", "background", "page", "frame", "axis", "slices"):
        where: dict[str, list[str]] = {}
        for site in sites:
            if key in type(site.source).model_fields:
                where.setdefault(_in_words(site.source.model_dump(mode="json")[key]), []).append(site.name)
        if len(where) > 1:
            each = "; ".join(f"{given} at {', '.join(names)}" for given, names in where.items())
            said.append(f"source.{key} differs: {each}")
    return said


def _in_words(given: Any) -> str:
    """A value of YAML as somebody would write it."""
    if isinstance(given, dict):
        return ", ".join(f"{key}: {_in_words(value)}" for key, value in given.items())
    if isinstance(given, list):
        return f"[{', '.join(_in_words(value) for value in given)}]"
    return "not given" if given is None else f"{given:g}" if isinstance(given, float) else str(given)
