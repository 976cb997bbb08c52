"""What lies in an image folder `<root>/<domain>/<class>/*` (the layout of DomainBed), found without opening any image; and
decoding the images, with names for those that cannot be decoded."""

from __future__ import annotations

import os
import re
import stat
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fedmerge.data.datasets._base import Geometry, same_names
from fedmerge.errors import Problem, folded, nearest, quoted

LAYOUT = "a folder with the layout <root>/<domain>/<class>/<image>"

LEFTOVERS = frozenset(
    (
        *("__macosx", "icon\r", "network trash folder", "temporary items", "thevolumesettingsfolder"),  # macOS
        *("thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
        *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000"),
        *("lost+found", "__pycache__"),
        *(
            "@eadir",
            "@recycle",
            "@recently-snapshot",
            "@sharebin",
            "@tmp",
            "#recycle",
            "#snapshot",
            "~snapshot",
        ),  # disks in a network
    )
)
"""What operating systems, network disks and tools leave in folders, in small letters; no image of anybody's."""

PARTS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing", "holdout"))
"""Names of the parts of a data set, which are no classes."""


class ImageFile(NamedTuple):
    """One entry below a class folder. path: relative to the root, with forward slashes; regular: an ordinary file."""

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
                if not passed_over(entry.name):
                    items.append(_item(domain, label, entry))
    return sorted(items, key=lambda item: item.path)


def passed_over(name: str) -> bool:
    """Whether an entry of a folder is hidden, or is what an operating system leaves there: it is neither read nor counted."""
    return name.startswith(".") or name.casefold() in LEFTOVERS


def unknown(folders: tuple[str, ...], known: tuple[str, ...]) -> list[Problem]:
    """Folders that are not there or named twice."""
    problems = [
        Problem("", "folders", quoted(name), "a domain of the root", nearest(name, known)) for name in folders if name not in known
    ]
    twice = sorted({name for name in folders if folders.count(name) > 1})
    return problems + [Problem("", "folders", f"'{name}' twice", "every domain once") for name in twice]


def alike(root: Path, folders: tuple[str, ...]) -> list[Problem]:
    """Domains and classes of one root whose names a person would take for the same. folders: the domains that are held."""
    domains = domains_of(root)
    held = {folded(name) for name in folders or domains}
    places = {name: root / name for name in domains if folded(name) in held}
    labels = {label: root / domain / label for domain in reversed(domains) for label in _folders(root / domain)}
    mend = "Rename the folders, so that it has one name wherever it stands"
    return same_names("root", "domain", places, mend) + same_names("root", "class", labels, mend)


def _item(domain: str, label: str, entry: os.DirEntry[str]) -> ImageFile:
    path = f"{domain}/{label}/{entry.name}"
    try:
        found = entry.stat()
    except OSError:  # a link to nowhere: named among the broken files when the images are loaded
        return ImageFile(domain, label, path, 0, 0, False)
    return ImageFile(domain, label, path, found.st_size, found.st_mtime_ns, stat.S_ISREG(found.st_mode))


def _folders(path: Path) -> tuple[str, ...]:
    with os.scandir(path) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not passed_over(entry.name)))


DAMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises for a file that is truncated, no image, or too large to be one."""


def decode(path: Path, geometry: Geometry) -> NDArray[np.uint8]:
    """One image (size, size, channels), turned as its EXIF says, in gray or color, resized with antialiasing.

    The whole image is stretched to a square, as in DomainBed. Raises one of DAMAGE.
    """
    with Image.open(path) as opened:
        upright: Any = ImageOps.exif_transpose(opened)
        if upright.mode.startswith("I"):  # 16 bits: keep the upper eight
            upright = Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        image = upright.convert("L" if geometry.channels == 1 else "RGB")
        image = image.resize((geometry.size, geometry.size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8).reshape(geometry.size, geometry.size, geometry.channels)


def decode_all(paths: Sequence[Path], geometry: Geometry) -> dict[str, NDArray[Any]]:
    """pixels (n, size, size, channels) of the files that can be decoded, `good` (n,) their positions in `paths`,

    and for the others `broken` (m,) their positions and `reasons` (m,) in words.
    """
    pixels: list[NDArray[np.uint8]] = []
    good: list[int] = []
    broken: list[tuple[int, str]] = []
    for position, path in enumerate(paths):
        try:
            pixels.append(decode(path, geometry))
            good.append(position)
        except DAMAGE as error:
            broken.append((position, "no image" if isinstance(error, UnidentifiedImageError) else str(error)))
    return {
        "pixels": np.stack(pixels) if pixels else np.empty((0, geometry.size, geometry.size, geometry.channels), np.uint8),
        "good": np.array(good, np.int64),
        "broken": np.array([position for position, _ in broken], np.int64),
        "reasons": np.array([reason for _, reason in broken], np.str_),
    }
