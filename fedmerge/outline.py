"""The verb `fedmerge outline`: a hospital's site file as its coordinator may have it, without a path of its disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fedmerge.configuration import check, read_yaml
from fedmerge.errors import Problem, ScenarioError
from fedmerge.site import Site


def outline(file: Path, seed: int) -> str:
    """The site of `file` as YAML, its source replaced by what may be known of it. seed: the scenario's.

    Raises ScenarioError if the file is no site, or its images cannot be found.
    """
    site = check(Site, read_yaml(file), str(file))
    if problems := site.source.check():
        raise ScenarioError([Problem(str(file), f"source.{p.key}".rstrip("."), p.found, p.expected, p.mend) for p in problems])
    known: dict[str, Any] = {
        "kind": "elsewhere",
        "labels": list(site.source.classes()),
        "parts": list(site.source.domains()),
        "sha256": site.source.identity(site.name, seed),
        "flips": site.source.flips,
    }
    written = site.model_dump(mode="json", exclude_defaults=True, exclude={"source", "attack", "shifts"})
    whole = site.model_dump(mode="json", include={"attack", "shifts"})
    written |= {name: value for name, value in whole.items() if value}
    first = f"# What a coordinator may know of '{site.name}' at seed {seed}; made by `fedmerge outline`, at the hospital.\n"
    return first + yaml.safe_dump({**written, "source": known}, sort_keys=False, allow_unicode=True)
