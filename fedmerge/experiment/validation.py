"""What the rows of a scenario's table are called, and what else in it names one of them."""

from __future__ import annotations

from collections.abc import Sequence

from fedmerge.errors import Problem, nearest
from fedmerge.experiment.scenario import Scenario


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
        Problem(where, those[-1], f"'{name}' {len(those)} times ({', '.join(those)})", "every row once", "Give one another 'label'")
        for those, name in same.items()
    ]


def generalist_nowhere(where: str, scenario: Scenario) -> list[Problem]:
    """A generalist that is neither a row of `federated` nor a file that is there."""
    given, keys = scenario.generalist, [strategy.key for strategy in scenario.federated]
    if given is None or str(given) in keys or given.is_file():
        return []
    found = f"'{given}', a folder" if given.is_dir() else f"'{given}', and no such file"
    rows = f", or a row of 'federated': {', '.join(keys)}" if keys else ""
    hint = nearest(str(given), keys) if keys else ""
    return [Problem(where, "generalist", found, f"a safetensors file{rows}", hint if hint.endswith("?") else "")]
