"""Images on disk: `<root>/<domain>/<class>/*`, the layout of DomainBed (Gulrajani & Lopez-Paz, ICLR 2021)."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, FiniteFloat

from fedmerge.data.cache import cached_rows
from fedmerge.data.datasets import _image_files
from fedmerge.data.datasets._base import Geometry, Source
from fedmerge.data.datasets._contents import digests
from fedmerge.data.datasets._decode import MOST_PIXELS, Reading, decode_all, shortened
from fedmerge.data.images import Images
from fedmerge.data.partition import Split
from fedmerge.errors import DataError, Problem, quoted

VERSION = 2
"""Raise it whenever the same files would give other pixels."""

ROOT = (
    "the folder; may begin with ~ and name environment variables as ${NAME}. "
    "A relative one is looked for in the folder where the command is given"
)

NO_FILES = "no files but links to nowhere or in a circle, pipes or the like"

log = logging.getLogger(__name__)


def _rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if not bounds[0] < bounds[1]:
        raise ValueError("expected [black, white] with black below white")
    return bounds


Bounds = Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(_rising)]


def _one_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"no regular expression ({error})") from None
    if groups != 1:
        raise ValueError(f"{groups} groups in it; expected one, the patient, e.g. '/(P\\d+)_'; others can be written (?:...)")
    return pattern


class ImageFolder(Source):
    """Every image is a group of its own: files say nothing about patients.

    Folders below a class, such as one for each patient, are read, too. Hidden files, and what operating systems leave in folders
    (`__MACOSX`, `@eaDir`, `Thumbs.db`, ...), are left alone.
    """

    root: str = Field(min_length=1, description=ROOT)
    folders: tuple[str, ...] = Field((), description="domains that this hospital holds: subfolders of the root; default all")
    split: Split | None = Field(None, description="the part of these domains that this hospital holds; default everything")
    patient: Annotated[str, AfterValidator(_one_group)] | None = Field(
        None,
        description="regular expression that finds the patient in a file's path below the root, as its one group, e.g. "
        r"'/(P\d+)_' for ward/nevus/P12_3.png, or '^[^/]+/[^/]+/([^/]+)/' for a folder of each patient below the classes. "
        "A patient's images stay together in splits and validation; default: every image by itself, for want of knowing",
    )
    flips: bool = Field(False, description="whether a horizontal flip preserves the label")
    max_broken: int = Field(3, ge=0, description="files that may be truncated or no image; they are named and left out")
    gray_range: Bounds | None = Field(
        None,
        description="[black, white] of images of more than 8 bits, in the files' own values; the same at all hospitals and "
        "the target if their values mean the same. Default: 0 to the most that 8, 10, 12, 14 or 16 bits hold (0 to 1 for "
        "fractions), the fewest that hold all images here; values below 0 need a range. Images of 8 bits stay as they are",
    )
    background: Literal["black", "white"] = Field("black", description="what shows through transparent pixels")
    page: int | None = Field(
        None, ge=1, description="which page, frame or slice of files that hold several, from 1; default the first, with a warning"
    )
    max_pixels: int = Field(
        MOST_PIXELS, ge=1, description="most pixels of an image; larger ones would fill the memory, and are refused"
    )
    hint: str = Field("", description="where to get the data; part of the message if the folder is not there")

    def check(self) -> list[Problem]:
        """A folder that is not there or may not be read, unknown domains, names that cannot be, and a part without two classes."""
        root = _image_files.locate(self.root, self.hint)
        if isinstance(root, Problem):
            return [root]
        try:
            known = _image_files.domains_of(root, self.folders)
            if wrong := _image_files.unknown(root, self.folders, known) or _image_files.unfit_names(root, self.folders):
                return wrong
            every = [item.path for domain in self.domains() for item in _image_files.items_of(root, domain)]
            if without := sum(self._patient(path) is None for path in every) if self.patient else 0:
                found = f"'{self.patient}', which finds no patient in {without} of {len(every)} paths below the root"
                expected = "an expression that finds one in every path <domain>/<class>/<file>, as its one group"
                return [Problem("", "patient", found, expected)]
            items, odd = self._listed(root)
            if len(odd) > self.max_broken:
                found, mend = f"{len(odd)} entries that are {NO_FILES}", "Remove them, or raise max_broken to leave them out"
                return [Problem("", "max_broken", found, f"at most {self.max_broken}", mend)]
            held = sorted({item.label for item in items})
            if len(held) > 1:
                return []
            left = _image_files.loose(root, self.domains())
        except OSError as error:
            return [_image_files.unreadable(error, root)]
        found = f"images of one class only ({held[0]})" if held else f"no image in '{root}'"
        found += f", and {left} that lie in no class folder" if left else ""
        mend = "Take another part or seed, or a larger alpha" if self.split else self.hint
        return [Problem("", "split" if self.split else "root", found, f"two classes or more in {_image_files.LAYOUT}", mend)]

    def remarks(self) -> list[str]:
        """What is left out, in counts, and what else may not be as its owner thinks."""
        with self._opened() as root:
            left, (items, odd) = _image_files.loose(root, self.domains()), self._listed(root)
        said = [f"images left out, for they lie in no class folder: {left}"] if left else []
        said += [f"entries left out, for they are {NO_FILES}: {len(odd)}"] if odd else []
        below = {item.label: set[str]() for item in items}
        for item in items:
            below[item.label].add(item.path.split("/", 3)[2] if item.path.count("/") > 2 else "")
        first = next(iter(below.values()), {""})
        if len(below) > 1 and "" not in first and all(those == first for those in below.values()):
            said.append(
                f"images of all classes ({', '.join(below)}) lie in the same folders below: is the root one folder too high?"
            )
        return said

    def shown(self) -> frozenset[str]:
        """Classes of the files that are held."""
        with self._opened() as root:
            return frozenset(item.label for item in self._items(root))

    def classes(self) -> tuple[str, ...]:
        """Class folders of all domains in the root that can be read, sorted."""
        with self._opened() as root:
            return tuple(_image_files.classes_of(root, self.folders))

    def how_to_add(self, classes: Sequence[str]) -> str:
        """Empty folders."""
        each = " and ".join(quoted(name) for name in classes)
        what = f"an empty folder {each}" if len(classes) == 1 else f"empty folders {each}"
        return f"Make {what} in {quoted(self._root() / self.domains()[0])} for what it has no image of"

    def domains(self) -> tuple[str, ...]:
        """The chosen domains, in the order given; otherwise all, sorted."""
        with self._opened() as root:
            return self.folders or _image_files.domains_of(root)

    def identity(self, owner: str, seed: int) -> str:
        """A sha256 of the files' names and contents and of the classes; the same files give the same images to any owner."""
        with self._opened() as root:
            items = self._items(root)
            files = list(zip([item.path for item in items], digests(owner, root, items), strict=True))
        determined = [VERSION, self.domains(), self.classes(), self.flips, self.patient, self._reading()[:-1], files]
        return hashlib.sha256(json.dumps(determined).encode()).hexdigest()

    def holdings(self, owner: str) -> dict[str, str]:
        """Full paths of the images of this part, by what the names lead to: links to a file are that file."""
        with self._opened() as root:
            at = root.resolve()
            paths = {item: str(at / item.path) for item in self._items(root)}
        return {f"{item.device}:{item.inode}" if item.inode else path: path for item, path in paths.items()}

    def contents(self, owner: str) -> frozenset[str]:
        """Of all files of this part, once each."""
        with self._opened() as root:
            return frozenset(digests(owner, root, self._items(root))) - {""}

    @property
    def knows_patients(self) -> bool:
        """Where their names can be found."""
        return self.patient is not None

    def load(self, geometry: Geometry, owner: str, seed: int) -> Images:
        """Images (N, size, size, channels) uint8, sorted by path within each domain.

        Raises DataError, with their names, if more than `max_broken` entries are truncated or no image, and if any cannot be read.
        """
        domains, classes, reading = self.domains(), self.classes(), self._reading()
        with self._opened() as root:
            items, odd = self._listed(root)
            files = list(zip([item.path for item in items], digests(owner, root, items), strict=True))
        key = hashlib.sha256(json.dumps([VERSION, str(root.resolve()), geometry, reading[:-1], files]).encode()).hexdigest()
        names, shape = [item.path for item in items], (len(items), geometry.size, geometry.size, geometry.channels)
        decoded = cached_rows(owner, key, shape, np.uint8, lambda rows: decode_all(root, names, geometry, reading, owner, rows))
        for note in decoded["notes"]:
            log.warning("site '%s': %s: %s", owner, root, note)
        broken = [f"{items[at].path} ({why})" for at, why in zip(decoded["broken"], decoded["reasons"], strict=True)]
        self._report(owner, root, broken + [f"{path} (no regular file)" for path in odd])
        good = [items[at] for at in decoded["good"]]
        labels = np.array([classes.index(item.label) for item in good], np.int64)
        sides = np.array([domains.index(item.domain) for item in good], np.int64)
        if len(np.unique(labels)) < 2:
            told = "images of fewer than two classes; expected two or more"
            raise DataError(f"site '{owner}': {root}: found {len(good)} {told}", f"source: found {told}")
        for number, domain in enumerate(domains):
            absent = [name for label, name in enumerate(classes) if not ((sides == number) & (labels == label)).any()]
            if absent:
                log.warning("site '%s': domain '%s' holds no image of %s", owner, domain, ", ".join(absent))
        groups = self._groups(good)
        return Images(decoded["pixels"], labels, sides, groups, classes, domains, flips=self.flips)

    def _reading(self) -> Reading:
        return Reading(self.gray_range, self.background, self.page, self.max_pixels)

    def _root(self) -> Path:
        root = _image_files.locate(self.root, self.hint)
        if isinstance(root, Problem):
            raise DataError(str(replace(root, where="image_folder")), f"source.root: cannot be used; expected {root.expected}")
        return root

    @contextmanager
    def _opened(self) -> Iterator[Path]:
        """The root. Raises DataError where it, or what it holds of this part, cannot be read."""
        root = self._root()
        try:
            yield root
        except OSError as error:
            text = str(replace(_image_files.unreadable(error, root), where="image_folder"))
            raise DataError(text, "source.root: cannot be read; expected folders that this user may read") from None

    def _items(self, root: Path) -> list[_image_files.ImageFile]:
        """The regular files of this part, domain after domain."""
        return self._listed(root)[0]

    def _listed(self, root: Path) -> tuple[list[_image_files.ImageFile], list[str]]:
        """The regular files of this part, and paths of all else: never opened, for a pipe would wait for ever."""
        held: list[_image_files.ImageFile] = []
        odd: list[str] = []
        for domain in self.folders or _image_files.domains_of(root):
            found = _image_files.items_of(root, domain)
            odd += [item.path for item in found if not item.regular]
            items = [item for item in found if item.regular]
            names, labels = np.unique([item.label for item in items], return_inverse=True)
            part: Iterable[int] = range(len(items))
            if self.split and len(names):
                part = self.split.indices(labels.astype(np.int64), domain, self._groups(items) if self.patient else None)
            held += [items[at] for at in part]
        return held, odd

    def _patient(self, path: str) -> str | None:
        found = re.search(self.patient or "", path)
        return (found[1] or None) if found else None

    def _groups(self, items: Sequence[_image_files.ImageFile]) -> NDArray[np.int64]:
        """A number for the patient of each file (n,), or for each file; of one of no patient, its path stands for the patient."""
        if self.patient is None:
            return np.arange(len(items), dtype=np.int64)
        names = [self._patient(item.path) or item.path for item in items]
        return np.unique(names, return_inverse=True)[1].astype(np.int64)

    def _report(self, owner: str, root: Path, broken: list[str]) -> None:
        if not broken:
            return
        shown = shortened(broken)
        if len(broken) > self.max_broken:
            raise DataError(
                f"site '{owner}': {root}: found {len(broken)} files that are no image: {shown}; expected at most "
                f"{self.max_broken}. Mend or remove them, or raise max_broken to leave them out",
                f"source.max_broken: found more than {self.max_broken} files that are no image; expected at most as many. "
                "Mend or remove them, or raise max_broken to leave them out",
            )
        log.warning("site '%s': %s: left out %d files that are no image: %s", owner, root, len(broken), shown)
