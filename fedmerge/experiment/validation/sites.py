"""What hospitals and their images say that does not fit together: names, events, classes, images and patients at two of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from fedmerge.errors import Problem, difference, folded, quoted
from fedmerge.experiment.scenario import Scenario
from fedmerge.experiment.validation.problems import names_in_yaml, placed
from fedmerge.federated.site import Site
from fedmerge.stream.events import Event, inconsistent


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
    """Lines about images of one content at a site or at two. Blank slices are alike by chance, so it is told, and not refused."""
    said = []
    held = [(site.name, site.source.contents(site.name)) for site in sites]
    for name, items in held:
        alike = [classes for classes in items.values() if len(classes) > 1]
        if alike:
            across = sum(len(classes) for classes in alike if len(set(classes)) > 1)
            wrong = f"; {across} of them are in different classes, as their own log says" if across else ""
            told = f"images with the same content as another, which validation may hold: {sum(map(len, alike))}"
            said.append(f"site '{name}': {told}{wrong}")
    for index, earlier in _sharing([items for _, items in held]):
        (name, items), (other, theirs) = held[index], held[earlier]
        if name != other and not _renewed(name, other, events):
            said.append(f"sites '{other}' and '{name}' have {len(items.keys() & theirs.keys())} images with the same content")
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
        found = (
            f"classes {', '.join(here)}"
            if not (missing or extra)
            else f"missing {names_in_yaml(missing)}, extra {names_in_yaml(extra)}"
        )
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
