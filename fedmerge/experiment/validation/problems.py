"""Problems as a user reads them: where they stand, each told once, and names as YAML has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedmerge.errors import Problem, quoted


def placed(where: str, key: str, problem: Problem) -> Problem:
    inner = ".".join(part for part in (key, problem.key) if part)
    return Problem(where, inner, problem.found, problem.expected, problem.mend)


def names_in_yaml(names: Any) -> str:
    """Names as YAML has them."""
    if isinstance(names, str):
        return quoted(names)
    if isinstance(names, dict):
        return f"{{{', '.join(f'{key}: {names_in_yaml(inner)}' for key, inner in names.items())}}}"
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
