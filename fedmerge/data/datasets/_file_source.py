"""What all sources of image files have in common, however their files are laid out: keys, identity, decoding, patients."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field, FiniteFloat, model_validator

from fedmerge.data.cache import cached_rows, folder
from fedmerge.data.datasets import _image_files
from fedmerge.data.datasets._base import Geometry, Pseudonyms, Source
from fedmerge.data.datasets._contents import digests
from fedmerge.data.datasets._decode import decode_all
from fedmerge.data.datasets._image_files import PLAIN_ENDS
from fedmerge.data.datasets._picture import MOST_PIXELS, Reading
from fedmerge.data.images import Images
from fedmerge.data.partition import Split
from fedmerge.errors import DataError, Problem, SourceError, first_of, folded, quoted
from fedmerge.registry import Spec
from fedmerge.system.files import at_home, atomic_write

VERSION = 3
"""Raise it whenever the same files would give other pixels."""

SCANS_VERSION = 1
"""Raise it instead where only DICOM or NIfTI files would."""

SHORTEST = 16
"""Bytes of a secret."""

RANGE = "gray_range.json"
"""In the owner's cache: how deep images were shown when they were loaded last."""

NAMED = 10_000
"""Files that are named in the site's own log, at most."""

log = logging.getLogger(__name__)


def _rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if not bounds[0] < bounds[1]:
        raise ValueError("expected [black, white] with black below white")
    return bounds


Percent = Annotated[float, Field(ge=0, le=100)]
Bounds = Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(_rising)]


def _secret(file: str) -> bytes | Problem:
    """What a file holds, without blanks and line ends around it."""
    path = at_home(file)
    expected = f"a file with a secret of {SHORTEST} bytes or more"
    try:
        secret = path.read_bytes().strip()
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return Problem(
            "", "patient_key", f"{quoted(path)}, which cannot be read ({why})", expected, "Ask the other hospitals for it"
        )
    if len(secret) < SHORTEST:
        return Problem("", "patient_key", f"{quoted(path)} with {len(secret)} bytes", expected, "Short ones can be guessed")
    return secret


def _hashed(secret: bytes, text: str) -> str:
    return hmac.new(secret, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


class GivenRange(Spec):
    """A range that is given."""

    window: Bounds = Field(description="[black, white] in the files' own values, after a DICOM file's rescaling")


class PercentileRange(Spec):
    """A range by the values of a site's own images."""

    percentile: Annotated[tuple[Percent, Percent], AfterValidator(_rising)] = Field(
        description="two percentages: values below the first are black, those above the second are white (4096 of each image count)"
    )


def _numbers(value: Any) -> Any:
    """One slice as a list of it."""
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


Slice = Annotated[int, Field(strict=True, ge=1)]
Slices = Annotated[Literal["middle", "all"] | Annotated[tuple[Slice, ...], Field(min_length=1)], BeforeValidator(_numbers)]


def _by_content(items: Sequence[_image_files.ImageFile], contents: Sequence[str]) -> dict[str, list[_image_files.ImageFile]]:
    """Items by their content, where that is known and not empty."""
    found: dict[str, list[_image_files.ImageFile]] = {}
    for item, content in zip(items, contents, strict=True):
        if content and item.size:
            found.setdefault(content, []).append(item)
    return found


def _version(names: Iterable[str]) -> list[int]:
    """What determines the pixels of these files by the code that reads them. DICOM may have any name but that of another image."""
    return [VERSION] if all(name.casefold().endswith(PLAIN_ENDS) for name in names) else [VERSION, SCANS_VERSION]


def numbers_of(patients: Sequence[str]) -> NDArray[np.int64]:
    """A number for the patient of each image (n,). Ways to write one name, which differ in case or blanks only, are one patient."""
    ways, member = np.unique(patients, return_inverse=True)
    first: dict[str, int] = {}
    return np.array([first.setdefault(folded(way), at) for at, way in enumerate(ways.tolist())], np.int64)[member]


def _digest(determined: list[Any]) -> str:
    return hashlib.sha256(json.dumps(determined).encode()).hexdigest()


def _keep(owner: str, of: str, bounds: list[float], images: int) -> None:
    """Write down how deep images are shown, for who writes the manifest. A cache that cannot be written is no error."""
    with suppress(OSError):
        (folder() / owner).mkdir(parents=True, exist_ok=True)
        atomic_write(folder() / owner / RANGE, json.dumps({"of": of, "range": bounds or None, "images": images}))


class FileSource(Source):
    """Images in files below a root. A layout says which files there are, and of what domain, class and patient each is."""

    left_out: ClassVar[str] = "files that are no image"

    split: Split | None = Field(None, description="part of these domains that this hospital holds; default: everything")
    flips: bool = Field(False, description="whether a horizontal flip preserves the label")
    max_broken: int = Field(
        3, ge=0, description="number of damaged files that are tolerated; they are left out, and named in the site's own log"
    )
    gray_range: Bounds | None = Field(
        None,
        description="[black, white] for images of more than 8 bits, in the files' own values; use the same at all "
        "hospitals and the target if their values mean the same. Default: the smallest range of 8, 10, "
        "12, 14 or 16 bits that holds all images here (0 to 1 for fractions); values below 0 need a "
        "range. Images of 8 bits stay as they are",
    )
    range: Literal["auto", "full", "file"] | GivenRange | PercentileRange = Field(
        "auto",
        description="rule for black and white in images of more than 8 bits; it is applied once for all images of a "
        "site, and the manifest has the result. auto: the window that all DICOM files name, otherwise "
        "the default of gray_range; full: least and greatest value; {window: [low, high]}: the same as "
        "gray_range; {percentile: [1, 99]}: of all values; file: each DICOM file's own window, or "
        "curve (SIGMOID, VOI LUT), so that one value may become different grays",
    )
    frame: int | None = Field(
        None,
        ge=1,
        description="frame of a DICOM file, or time point of a NIfTI file, counted from 1; by default files with "
        "several are refused",
    )
    axis: Literal["axial", "coronal", "sagittal"] = Field("axial", description="plane in which NIfTI volumes are sliced")
    slices: Slices = Field(
        "middle",
        description="slices of NIfTI volumes: middle, all, or their numbers, counted from 1 at the patient's feet, back or left",
    )
    background: Literal["black", "white"] = Field("black", description="color behind transparent pixels")
    page: int | None = Field(
        None,
        ge=1,
        description="page, frame or slice of files that hold several, counted from 1; default: the first, with a warning",
    )
    max_pixels: int = Field(
        MOST_PIXELS, ge=1, description="largest number of pixels of an image; a larger one is refused, before it fills the memory"
    )
    patient_key: str | None = Field(
        None,
        description="file with a secret of 16 bytes or more that hospitals agree on (e.g. from `openssl rand -hex "
        "32`) and that is sent to nobody. It finds patients of two hospitals without their names. "
        "Default: this is not checked",
    )
    hint: str = Field("", description="where to get the data; the message about a missing folder says it")

    @model_validator(mode="after")
    def _one_range(self) -> Self:
        if self.gray_range and self.range != "auto":
            raise ValueError("gray_range and range: expected one of them; gray_range: [a, b] is range: {window: [a, b]}")
        return self

    @abstractmethod
    def _located(self) -> Path | Problem:
        """The folder that paths are relative to, or what is wrong with it."""

    @abstractmethod
    def _found(self, root: Path) -> tuple[list[_image_files.ImageFile], list[str]]:
        """All regular files of the chosen domains, domain after domain; and what is left out, by path and reason.

        Raises OSError for what cannot be read.
        """

    def _patient_of(self, item: _image_files.ImageFile) -> str | None:
        """The patient whose image it is, as the hospital calls her."""
        return item.patient or None

    def _determined(self) -> list[Any]:
        """What determines the images beside the files, by the layout's keys."""
        return []

    def pseudonyms(self) -> Pseudonyms | None:
        """HMAC-SHA256 of the patients' names, folded, under the secret of `patient_key`."""
        if self.patient_key is None or not self.knows_patients:
            return None
        secret = _secret(self.patient_key)
        if isinstance(secret, Problem):
            raise SourceError(replace(secret, where=self.kind()))
        with self._opened() as root:
            names = {self._patient_of(item) for item in self._items(root)} - {None}
        return Pseudonyms(_hashed(secret, "which secret"), frozenset(_hashed(secret, f"patient {folded(str(n))}") for n in names))

    def unkeyed(self) -> list[Problem]:
        """What is wrong with `patient_key`: part of `check`."""
        if self.patient_key is None:
            return []
        if not self.knows_patients:
            expected = "a source that knows patients: the key makes digests of them"
            return [Problem("", "patient_key", quoted(self.patient_key), expected, "Say where the patient stands, or leave it out")]
        secret = _secret(self.patient_key)
        return [secret] if isinstance(secret, Problem) else []

    def shown(self) -> frozenset[str]:
        """Classes of the files that are held."""
        with self._opened() as root:
            return frozenset(item.label for item in self._items(root))

    def identity(self, owner: str, seed: int) -> str:
        """A sha256 of the files' names and contents and of the classes; the same files give the same images to any owner."""
        files = self._files(owner)
        determined = [
            *_version(path for path, _ in files),
            self.domains(),
            self.classes(),
            self.flips,
            *self._determined(),
            self._reading().determining(),
            files,
        ]
        return _digest(determined)

    def _files(self, owner: str) -> list[tuple[str, str]]:
        """Path and digest of every file that is held."""
        with self._opened() as root:
            items = self._items(root)
            return list(zip([item.path for item in items], digests(owner, root, items), strict=True))

    def _of(self, files: Sequence[tuple[str, str]]) -> str:
        """Digest of what gray ranges hang on."""
        return _digest([*_version(path for path, _ in files), self._reading().determining(), files])

    def decided(self, owner: str) -> dict[str, Any]:
        """Black and white of deep images (`range`; None where each file has its own), how many, and by what rule."""
        try:
            kept = json.loads((folder() / owner / RANGE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not kept["images"] or kept.pop("of") != self._of(self._files(owner)):
            return {}
        rule = (
            "gray_range" if self.gray_range else self.range if isinstance(self.range, str) else self.range.model_dump(mode="json")
        )
        return {"gray_range": {**kept, "rule": rule}}

    def holdings(self, owner: str) -> dict[str, str]:
        """Full paths of the images of this part, by what the names lead to: links to a file are that file."""
        with self._opened() as root:
            at = root.resolve()
            paths = {item: str(at / item.path) for item in self._items(root)}
        return {f"{item.device}:{item.inode}" if item.inode else path: path for item, path in paths.items()}

    def contents(self, owner: str) -> dict[str, tuple[str, ...]]:
        """Of all files of this part that are not empty, by digests of their bytes."""
        with self._opened() as root:
            items = self._items(root)
            held = _by_content(items, digests(owner, root, items))
        return {content: tuple(item.label for item in those) for content, those in held.items()}

    def load(self, geometry: Geometry, owner: str, seed: int) -> Images:
        """Images (N, size, size, channels) uint8, sorted by path within each domain.

        Raises DataError, with their names, if more than `max_broken` entries are truncated or no image, and if any cannot be read.
        """
        domains, classes, reading = self.domains(), self.classes(), self._reading()
        with self._opened() as root:
            items, odd = self._listed(root)
            files = list(zip([item.path for item in items], digests(owner, root, items), strict=True))
        names = [item.path for item in items]
        key = _digest(["with its range", *_version(names), str(root.resolve()), geometry, reading.determining(), files])
        decoded = cached_rows(owner, key, lambda rows: decode_all(root, names, geometry, reading, owner, rows))
        _keep(owner, self._of(files), decoded["range"].tolist(), int(decoded["deep"]))
        for note in decoded["notes"]:
            log.warning("site '%s': %s: %s", owner, root, note)
        broken = [f"{items[at].path} ({why})" for at, why in zip(decoded["broken"], decoded["reasons"], strict=True)]
        self._report(owner, root, broken + odd)
        for those in _by_content(items, [digest for _, digest in files]).values():
            if len({item.label for item in those}) > 1:
                same = " = ".join(item.path for item in those[:NAMED])
                log.warning("site '%s': %s: files of different classes with the same content: %s", owner, root, same)
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

    def _root(self) -> Path:
        """The folder that paths are relative to. Raises SourceError."""
        root = self._located()
        if isinstance(root, Problem):
            raise SourceError(replace(root, where=self.kind()))
        return root

    def _reading(self) -> Reading:
        given, rule = self.gray_range, self.range
        if isinstance(rule, GivenRange):
            given, rule = rule.window, "auto"
        named = rule.percentile if isinstance(rule, PercentileRange) else rule
        return Reading(given, self.background, self.page, self.max_pixels, named, self.frame, self.axis, self.slices)

    @contextmanager
    def _opened(self) -> Iterator[Path]:
        """The root. Raises DataError where it, or what it holds of this part, cannot be read."""
        root = self._root()
        try:
            yield root
        except OSError as error:
            text = str(replace(_image_files.unreadable(error, root), where=self.kind()))
            raise DataError(text, "source.root: cannot be read; expected folders that this user may read") from None

    def _items(self, root: Path) -> list[_image_files.ImageFile]:
        """The regular files of this part, domain after domain."""
        return self._listed(root)[0]

    def _listed(self, root: Path) -> tuple[list[_image_files.ImageFile], list[str]]:
        """The regular files of this part, and paths of what is left out: never opened, for a pipe would wait for ever."""
        found, odd = self._found(root)
        return self._part(found), odd

    def _part(self, found: list[_image_files.ImageFile]) -> list[_image_files.ImageFile]:
        """What of the chosen domains is this hospital's."""
        if self.split is None:
            return found
        held: list[_image_files.ImageFile] = []
        for domain in dict.fromkeys(item.domain for item in found):
            items = [item for item in found if item.domain == domain]
            labels = np.unique([item.label for item in items], return_inverse=True)[1]
            part = self.split.indices(labels.astype(np.int64), domain, self._groups(items) if self.knows_patients else None)
            held += [items[at] for at in part]
        return held

    def _groups(self, items: Sequence[_image_files.ImageFile]) -> NDArray[np.int64]:
        """A number for the patient of each image (n,), or for its file; of one of no patient, its path stands for the patient."""
        if not self.knows_patients:
            places = {path: number for number, path in enumerate(dict.fromkeys(item.path for item in items))}
            return np.array([places[item.path] for item in items], np.int64)
        return numbers_of([self._patient_of(item) or item.path for item in items])

    def _report(self, owner: str, root: Path, broken: list[str]) -> None:
        if not broken:
            return
        what, most = self.left_out, self.max_broken
        log.warning("site '%s': %s: left out %d %s: %s", owner, root, len(broken), what, first_of(broken, NAMED, "; "))
        if len(broken) > most:
            mend, few = "Mend or remove them, or raise max_broken to leave them out", first_of(broken, 5, "; ")
            raise DataError(
                f"site '{owner}': {root}: found {len(broken)} {what}: {few}; expected at most {most}. {mend}",
                f"source.max_broken: found more than {most} {what}; expected at most as many. {mend}",
            )
