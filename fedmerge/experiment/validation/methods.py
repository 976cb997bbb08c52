"""What methods need and the scenario lacks: statistics, priors, theta_0 as an expert, a name of their own."""

from __future__ import annotations

from collections.abc import Sequence

from fedmerge.errors import CheckpointError, Problem, nearest
from fedmerge.experiment.scenario import Scenario
from fedmerge.experiment.validation.problems import names_in_yaml
from fedmerge.federated.model import build
from fedmerge.federated.site import Site
from fedmerge.federated.statistics._base import STATISTICS
from fedmerge.merging.methods._base import Method
from fedmerge.merging.prior import head_bias


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
    if method.with_theta_0 and (method.refuses_theta_0 or (scenario.target.shards or 1) > 1):
        why = method.refuses_theta_0 or "No shard holds theta_0"
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
        found = "no prevalences" if given is None else f"prevalences of {names_in_yaml(sorted(given))}"
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
