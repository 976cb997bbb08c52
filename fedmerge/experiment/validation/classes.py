"""Which classes hospitals train on and the target has, and the prompts for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedmerge.errors import Problem, nearest, quoted
from fedmerge.experiment.scenario import Scenario
from fedmerge.experiment.validation.problems import names_in_yaml
from fedmerge.federated.model import ClipSpec
from fedmerge.federated.site import Site


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
        expected = f"those of the hospitals, {names_in_yaml(sorted(trained))}, or the key 'initialization'"
        mend = "Without it there is no text tower to make a head for other classes"
        problems.append(Problem(where, "target.classes", names_in_yaml(asked), expected, mend))
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
        expected = f"{names_in_yaml(trained)}, in this order: rows of trained heads are the hospitals' classes"
        problems.append(Problem(where, "target.classes", names_in_yaml(asked), expected, "Or say 'model.head: text'"))
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
    found = [Problem(where, key, names_in_yaml(names), expected, mend) for key, names in given.items() if names]
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
