"""The verb `fedmerge keys`: a private key for one hospital, and its public key into the hospital's file.

The verb `fedmerge outline`: a hospital's site file as its coordinator may have it, without a path of its disk.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from fedmerge.errors import FolderError, Problem, ScenarioError
from fedmerge.federated.security.signing import key_file, make
from fedmerge.federated.site import Site
from fedmerge.system.files import atomic
from fedmerge.system.yaml_loader import check, read_yaml

LINE = re.compile(r"^public_key:[^\n]*\n?", re.MULTILINE)
NAME = re.compile(r"^name:[^\n]*(\n|\Z)", re.MULTILINE)


def give_key(file: Path, folder: Path | None, renew: bool) -> tuple[Path, str]:
    """Make a pair for the site of `file`; everything else in the file stays, comments too. The private key's file, the public key.

    Raises ScenarioError if the file is no site, FolderError if there is a key already, or no place for one.
    """
    site = check(Site, read_yaml(file), str(file))
    private = key_file(site.name, folder)
    if site.public_key and not renew:
        raise FolderError(f"{file}: found a public_key; expected none. Give --renew to replace it: what it signed is void then")
    text = _read(file)
    trial = yaml.safe_load(_written(file, text, "trial"))  # before a key is made: a file that cannot take one costs none
    if trial != {**yaml.safe_load(text), "public_key": "trial"}:
        raise FolderError(f"{file}: 'name' or 'public_key' is not a line of its own; expected 'name: {site.name}' on one line")
    if not os.access(file, os.W_OK) or not os.access(file.parent, os.W_OK):
        raise FolderError(f"{file}: cannot be written to; expected a file that can take the public key")
    public = make(private, renew)
    with atomic(file) as draft:
        draft.write_bytes(_written(file, text, public).encode())
        shutil.copymode(file, draft)
    return private, public


def _read(file: Path) -> str:
    with file.open(encoding="utf-8", newline="") as opened:
        return opened.read()


def _written(file: Path, text: str, public: str) -> str:
    """The file's text with its public key: in place of the old one, or below the name. Raises FolderError if neither is there."""
    end = "\r\n" if "\r\n" in text else "\n"
    line = f"public_key: {public}{end}"
    if LINE.search(text):
        return LINE.sub(lambda _: line, text, count=1)
    found = NAME.search(text)
    if found is None:
        raise FolderError(f"{file}: found no line that begins with 'name:'; expected one, to put the public key below it")
    gap = "" if found.group().endswith("\n") else end
    return text[: found.end()] + gap + line + text[found.end() :]


def site_outline(file: Path, seed: int) -> str:
    """The site of `file` as YAML, its source replaced by what may be known of it. seed: the scenario's.

    Raises ScenarioError if the file is no site, or its images cannot be found.
    """
    site = check(Site, read_yaml(file), str(file))
    if problems := site.source.check():
        raise ScenarioError([Problem(str(file), f"source.{p.key}".rstrip("."), p.found, p.expected, p.mend) for p in problems])
    known: dict[str, Any] = {
        "kind": "remote",
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
