"""The verb `fedmerge keys`: a private key for one hospital, and its public key into the hospital's file.

The verb `fedmerge outline`: a hospital's site file as its coordinator may have it, without a path of its disk.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.tokens import CommentToken
from ruamel.yaml.util import load_yaml_guess_indent

from fedmerge.errors import FolderError, Problem, ScenarioError
from fedmerge.experiment.validation.problems import placed
from fedmerge.federated.security.signing import key_file, make
from fedmerge.federated.site import OwnExpert, Site
from fedmerge.system.files import atomic
from fedmerge.system.yaml_loader import lined, read_as

KEY = "public_key"


def give_key(file: Path, folder: Path | None, renew: bool) -> tuple[Path, str]:
    """Make a pair for the site of `file`; everything else in the file stays, comments too. The private key's file, the public key.

    Raises ScenarioError if the file is no site, FolderError if there is a key already, or no place for one.
    """
    site = read_as(Site, file)
    private = key_file(site.name, folder)
    if site.public_key and not renew:
        raise FolderError(f"{file}: found a public_key; expected none. Give --renew to replace it: what it signed is void then")
    text = _read(file)
    if not _takes_a_key(text):  # asked before a key is made: a file that cannot take one costs none
        found = "values or comments that rewriting would change"
        raise FolderError(f"{file}: found {found}; expected plain ones, and no comment above '---'")
    if not os.access(file, os.W_OK) or not os.access(file.parent, os.W_OK):
        raise FolderError(
            f"{file}: found a file that this user may not write; expected one that can take the public key. Change its rights"
        )
    public = make(private, renew)
    with atomic(file) as draft:
        draft.write_bytes(_written(text, public).encode())
        shutil.copymode(file, draft)
    return private, public


def _read(file: Path) -> str:
    with file.open(encoding="utf-8", newline="") as opened:
        return opened.read()


def _takes_a_key(text: str) -> bool:
    """Whether every value and comment is the same after a public key is written."""
    try:
        trial = _written(text, "trial")
    except (YAMLError, ValueError, LookupError):  # values that only PyYAML can read
        return False
    return bool(yaml.safe_load(trial) == {**yaml.safe_load(text), KEY: "trial"}) and _comments(trial) == _comments(text)


def _comments(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.lstrip().startswith("#")]


def _written(text: str, public: str) -> str:
    """The file's text with its public key: in place of the old one, or below the name. Comments, order and quotes stay."""
    end = "\r\n" if "\r\n" in text else "\n"
    both = YAML()
    both.preserve_quotes, both.width = True, sys.maxsize  # no line is broken
    mapping, indent, dash = load_yaml_guess_indent(text.replace("\r\n", "\n"), yaml=both)
    source = mapping["source"]
    below = 2 if source.fa.flow_style() else source.lc.col
    both.indent(mapping=below, sequence=indent if dash is not None else below, offset=dash or 0)
    both.explicit_start = text.startswith("---")
    if KEY in mapping:
        mapping[KEY] = public
    else:
        mapping.insert(list(mapping).index("name") + 1, KEY, public)
        _move_comments(mapping)
    both.dump(mapping, written := io.StringIO())
    whole = written.getvalue() if text.endswith("\n") else written.getvalue().removesuffix("\n")
    return whole.replace("\n", end)


def _move_comments(mapping: Any) -> None:
    """Comments below the name belong to what follows; ruamel keeps them with the name, and so above the public key."""
    kept = mapping.ca.items.get("name")
    if kept is None or kept[2] is None:
        return
    beside, _, below = kept[2].value.partition("\n")
    if below:
        mapping.ca.items[KEY] = [None, None, CommentToken(f"\n{below}", kept[2].start_mark), None]
        kept[2].value = f"{beside}\n"
    if not beside:
        del mapping.ca.items["name"]


def _known_file(file: Path, expert: OwnExpert) -> str:
    if not (digest := expert.digest):
        wrong = Problem(str(file), "expert.checkpoint", f"'{expert.checkpoint}'", "a file that can be read")
        raise ScenarioError(lined([wrong], file))
    return digest


def site_outline(file: Path, seed: int) -> str:
    """The site of `file` as YAML, its source replaced by what may be known of it. seed: the scenario's.

    Raises ScenarioError if the file is no site, or its images cannot be found.
    """
    site = read_as(Site, file)
    if problems := site.source.check():
        raise ScenarioError(lined([placed(str(file), "source", problem) for problem in problems], file))
    known: dict[str, Any] = {
        "kind": "remote",
        "labels": list(site.source.classes()),
        "parts": list(site.source.domains()),
        "sha256": site.source.identity(site.name, seed),
        "flips": site.source.flips,
    }
    if getattr(site.source, "patient_key", None) and (told := site.source.pseudonyms()):
        known |= {"patient_key": told.secret, "patients": sorted(told.patients)}
    written = site.model_dump(mode="json", exclude_defaults=True, exclude={"source", "attack", "shifts", "expert"})
    if site.expert:
        classes = {"classes": list(site.expert.classes)} if site.expert.classes else {}
        written["expert"] = {"sha256": _known_file(file, site.expert), **classes}
    whole = site.model_dump(mode="json", include={"attack", "shifts"})
    written |= {name: value for name, value in whole.items() if value}
    first = f"# What a coordinator may know of '{site.name}' at seed {seed}; made by `fedmerge outline`, at the hospital.\n"
    return first + yaml.safe_dump({**written, "source": known}, sort_keys=False, allow_unicode=True)
