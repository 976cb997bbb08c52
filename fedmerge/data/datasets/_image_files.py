"""What lies in an image folder `<root>/<domain>/<class>/*` (the layout of DomainBed), found without opening any image."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from fedmerge.errors import Problem, nearest

LAYOUT = "a folder with the layout <root>/<domain>/<class>/<image>"


class ImageFile(NamedTuple):
    """One entry of a class folder. path: relative to the root, with forward slashes; regular: an ordinary file."""

    domain: str
    label: str
    path: str
    size: int
    modified: int
    regular: bool


def locate(root: str, hint: str) -> Path | Problem:
    """The folder that `root` names, with `~` and environment variables filled in, or what is wrong with it."""
    mend = f"The data: {hint}" if hint else ""
    full = os.path.expandvars(root)
    if unset := re.search(r"\$\{?(\w+)\}?", full):
        name = unset[1]
        first = f"Set {name} to the folder in which {Path(root.partition(unset[0])[2].lstrip('/') or 'the domains')} lies"
        return Problem("", "root", f"'{root}', but {name} is not set", LAYOUT, f"{first}. {mend}".strip())
    path = Path(full)
    try:
        path = path.expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        return Problem("", "root", f"'{path}' ({error})", LAYOUT, mend)
    if not is_folder:
        what = "which is not a folder" if path.exists() else "which does not exist"
        return Problem("", "root", f"'{path}', {what}", LAYOUT, mend)
    return path


def domains_of(root: Path) -> tuple[str, ...]:
    """Names of the domains, sorted; whatever else lies in the root is left alone."""
    return _folders(root)


def classes_of(root: Path) -> tuple[str, ...]:
    """Names of the classes of all domains, sorted, so that hospitals which share a root agree on them."""
    return tuple(sorted({label for domain in domains_of(root) for label in _folders(root / domain)}))


def items_of(root: Path, domain: str) -> list[ImageFile]:
    """Entries of the class folders of one domain, sorted by path; hidden ones are left out. Raises OSError."""
    items: list[ImageFile] = []
    for label in _folders(root / domain):
        with os.scandir(root / domain / label) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    items.append(_item(domain, label, entry))
    return sorted(items, key=lambda item: item.path)


def unknown(folders: tuple[str, ...], known: tuple[str, ...]) -> list[Problem]:
    """Folders that are not there or named twice."""
    problems = [
        Problem("", "folders", f"'{name}'", "a domain of the root", nearest(name, known)) for name in folders if name not in known
    ]
    twice = sorted({name for name in folders if folders.count(name) > 1})
    return problems + [Problem("", "folders", f"'{name}' twice", "every domain once") for name in twice]


def _item(domain: str, label: str, entry: os.DirEntry[str]) -> ImageFile:
    path = f"{domain}/{label}/{entry.name}"
    try:
        found = entry.stat()
    except OSError:  # a link to nowhere: named among the broken files when the images are loaded
        return ImageFile(domain, label, path, 0, 0, False)
    return ImageFile(domain, label, path, found.st_size, found.st_mtime_ns, stat.S_ISREG(found.st_mode))


def _folders(path: Path) -> tuple[str, ...]:
    with os.scandir(path) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))
