"""MedMNIST's two-dimensional data sets in all published sizes: one .npz file each, described by the package's own INFO."""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from fedmerge.data.cache import Arrays, Rows, cached, cached_rows, parts
from fedmerge.data.datasets import _image_files
from fedmerge.data.datasets._base import Geometry, Source
from fedmerge.data.datasets._contents import digests
from fedmerge.data.datasets._public import COUNTS, PARTS, ROOT, Published, chosen
from fedmerge.data.images import Images
from fedmerge.data.partition import Split
from fedmerge.errors import Problem, SourceError, extras_named, quoted

log = logging.getLogger(__name__)

VERSION = 1
"""Raise it whenever the same file would give other pixels."""

NAMED = 5
"""Images that a line lists."""

SPLITS = ("train", "val", "test")
WHERE = "zenodo.org/records/10519652; python -m medmnist download --size=28"
LAYOUT = "<data set>.npz for 28 pixels, <data set>_<64, 128 or 224>.npz for others"

Flag = Literal[
    "pathmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist", "bloodmnist", "tissuemnist",
    "organamnist", "organcmnist", "organsmnist",
]  # fmt: skip
"""All with one label for each image; chestmnist has fourteen."""


class Medmnist(Source):
    """Every image is a group of its own: the files say nothing of patients. The domain is the data set."""

    published: ClassVar = {
        "medmnist": Published(
            title="MedMNIST v2 and MedMNIST+",
            classes=(),
            images={},
            layout=LAYOUT,
            license="CC BY 4.0; dermamnist CC BY-NC 4.0",
            citation="Yang et al., MedMNIST v2, Scientific Data 10, 2023",
            where=WHERE,
            parts=SPLITS,
        )
    }

    root: str = Field(min_length=1, description=ROOT)
    datasets: tuple[Flag, ...] = Field(
        min_length=1, description="data sets, which are one domain each; all must have the same classes"
    )
    size: Literal[28, 64, 128, 224] = Field(28, description="side of the images in pixels, as they were published")
    take: tuple[Literal["train", "val", "test"], ...] = Field((), description=PARTS)
    split: Split | None = Field(None, description="part of these domains that this hospital holds; default: everything")
    flips: bool = Field(False, description="whether a horizontal flip preserves the label; for organs it does not")
    check_counts: bool = Field(True, description=COUNTS)
    hint: str = Field("", description="where to get the data; the message about a missing folder says it")

    def check(self) -> list[Problem]:
        """A root or file that is not there, arrays that are not as published, data sets of different classes."""
        if wrong := chosen("datasets", self.datasets, self.datasets) + chosen("take", self.take, SPLITS):
            return wrong
        if len({_labels(name) for name in self.datasets}) > 1:
            found = "; ".join(f"{name}: {', '.join(_labels(name))}" for name in self.datasets)
            return [Problem("", "datasets", found, "data sets with the same classes")]
        try:
            labels = self._labels_of()
            held = [labels[name][part][places] for name in self.datasets for part, places in self._indices(name).items()]
            if len(classes := np.unique(np.concatenate(held))) < 2:
                key = "split" if self.split else "take" if self.take else "root"
                found = f"{sum(map(len, held))} images, of {len(classes)} class{'es' * (len(classes) != 1)}"
                return [Problem("", key, found, "images of two classes or more")]
        except SourceError as error:
            return [error.problem]
        except OSError as error:
            return [_image_files.unreadable(error, Path(error.filename or self.root))]
        return []

    def classes(self) -> tuple[str, ...]:
        """As the package has them."""
        return _labels(self.datasets[0])

    def domains(self) -> tuple[str, ...]:
        """The data sets."""
        return self.datasets

    def identity(self, owner: str, seed: int) -> str:
        """A sha256 of the files and the fields."""
        fields = self.model_dump(mode="json", exclude={"root", "hint", "check_counts"})
        return hashlib.sha256(json.dumps([VERSION, fields, self._digests(owner)], sort_keys=True).encode()).hexdigest()

    def holdings(self, owner: str) -> dict[str, str]:
        """Every image by its file, part and place."""
        return {
            f"{whole}:{part}:{at}": f"{file.name}, {part}, image {at}"
            for name, file in self._files().items()
            for whole in [file.resolve()]
            for part, places in self._indices(name).items()
            for at in places.tolist()
        }

    def contents(self, owner: str) -> dict[str, tuple[str, ...]]:
        """Of all images of this part, by digests of their pixels: a file is unpacked for them once."""
        return {mark: tuple(name for name, _ in images) for mark, images in self._alike(owner).items()}

    def _tell_of_doubts(self, owner: str) -> None:
        """Where one image is in two classes, in the owner's own log."""
        for images in self._alike(owner).values():
            if len({name for name, _ in images}) > 1:
                same = " = ".join(place for _, place in images[:NAMED])
                log.warning("site '%s': %s: images of different classes with the same content: %s", owner, self._root(), same)

    def _alike(self, owner: str) -> dict[str, list[tuple[str, str]]]:
        """Class and place of the images that have the same pixels, by a digest of these."""
        names, labels, marks = self.classes(), self._labels_of(), iter(self._marks(owner))
        found: dict[str, list[tuple[str, str]]] = {}
        for name in self.datasets:
            for part, places in self._indices(name).items():
                for at, label in zip(places.tolist(), labels[name][part][places].tolist(), strict=True):
                    found.setdefault(next(marks), []).append((names[label], f"{name}, {part}, image {at}"))
        return found

    def _marks(self, owner: str) -> list[str]:
        """A digest of every image's pixels."""

        def make() -> Arrays:
            held = [(name, part, places) for name in self.datasets for part, places in self._indices(name).items()]
            blocks = (images for name, part, places in held for images in _pictures(self._files()[name], f"{part}_images", places))
            return {"marks": np.array([_mark(image) for images in blocks for image in images])}

        return [str(mark) for mark in cached(owner, f"{self.identity(owner, 0)}-contents", make)["marks"]]

    @property
    def knows_patients(self) -> bool:
        """The files do not say."""
        return False

    def load(self, geometry: Geometry, owner: str, seed: int) -> Images:
        """Images (N, size, size, channels) uint8, by data set, part and place."""
        key = f"{self.identity(owner, seed)}-{geometry.size}-{geometry.channels}"
        stored = cached_rows(owner, key, lambda rows: self._read(geometry, rows))
        index = np.arange(len(stored["labels"]))
        self._tell_of_doubts(owner)
        return Images(
            stored["pixels"], stored["labels"], stored["domains"], index, self.classes(), self.domains(), flips=self.flips
        )

    def _read(self, geometry: Geometry, rows: Rows) -> Arrays:
        labels: list[NDArray[np.int64]] = []
        domains: list[NDArray[np.int64]] = []
        held = [(name, part, places) for name in self.datasets for part, places in self._indices(name).items()]
        rows.begin((sum(len(places) for _, _, places in held), geometry.size, geometry.size, geometry.channels), np.uint8)
        done = 0
        for name, part, places in held:
            for images in _pictures(self._files()[name], f"{part}_images", places):
                rows.put(done, _sized(images, geometry))
                done += len(images)
            labels.append(self._labels_of()[name][part][places])
            domains.append(np.full(len(places), self.datasets.index(name), np.int64))
        return {"labels": np.concatenate(labels), "domains": np.concatenate(domains)}

    def _root(self) -> Path:
        root = _image_files.locate(self.root, self.hint or WHERE)
        if isinstance(root, Problem):
            raise SourceError(replace(root, where=self.kind(), expected=f"the folder of MedMNIST: {LAYOUT}"))
        return root

    def _files(self) -> dict[str, Path]:
        root, end = self._root(), "" if self.size == 28 else f"_{self.size}"
        files: dict[str, Path] = {name: root / f"{name}{end}.npz" for name in self.datasets}
        if missing := [file.name for file in files.values() if not file.is_file()]:
            raise _wrong(f"no {', '.join(missing)} in {quoted(root)}", f"the folder of MedMNIST: {LAYOUT}")
        return files

    def _digests(self, owner: str) -> tuple[str, ...]:
        items = [_image_files.ImageFile(name, "", file.name).seen(file.stat()) for name, file in self._files().items()]
        return digests(owner, self._root(), items)

    def _parts(self) -> tuple[str, ...]:
        return self.take or SPLITS

    def _labels_of(self) -> dict[str, dict[str, NDArray[np.int64]]]:
        """Labels (n,) by data set and part. Raises SourceError for arrays that are not as published."""
        found: dict[str, dict[str, NDArray[np.int64]]] = {}
        for name, file in self._files().items():
            facts = file.stat()
            labels = _labels_in(file, (facts.st_mtime_ns, facts.st_size))
            published = _info(name)["n_samples"]
            for part in SPLITS:
                count, wanted = len(labels[part]), published[part]
                if self.check_counts and count != wanted:
                    mend = f"Get it again ({WHERE}), or say check_counts: false if some are left out on purpose"
                    raise _wrong(f"{count} images of '{part}', not {wanted} in {quoted(file)}", "the published number", mend)
                if labels[part].size and not 0 <= labels[part].min() <= labels[part].max() < len(_labels(name)):
                    raise _wrong(f"labels outside of 0 to {len(_labels(name)) - 1} in {quoted(file)}", "labels as published")
            found[name] = {part: labels[part] for part in self._parts()}
        return found

    def _indices(self, name: str) -> dict[str, NDArray[np.int64]]:
        """Places of this hospital's images in each part of a data set."""
        labels = self._labels_of()[name]
        if self.split is None:
            return {part: np.arange(len(given)) for part, given in labels.items()}
        return {part: self.split.indices(given, f"{name} {part}") for part, given in labels.items()}


def _mark(image: NDArray[np.uint8]) -> str:
    return hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()


UNREADABLE = (ValueError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError)


def _unreadable(file: Path, error: Exception) -> SourceError:
    return _wrong(f"{quoted(file)}, which cannot be read ({error})", "an .npz of MedMNIST, whole")


def _wrong(found: str, expected: str, mend: str = "") -> SourceError:
    return SourceError(Problem("medmnist", "root", found, expected, mend or f"The data: {WHERE}"))


def _info(name: str) -> dict[str, Any]:
    with extras_named():
        from medmnist import INFO
    return dict(INFO[name])


@cache
def _labels(name: str) -> tuple[str, ...]:
    labels = _info(name)["label"]
    return tuple(labels[str(number)] for number in range(len(labels)))


def _arrays(file: Path, name: str) -> NDArray[Any]:
    """One array of the file. Raises SourceError if it is not there or cannot be read."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if name not in arrays.files:
                expected = ", ".join(f"{part}_{what}" for what in ("images", "labels") for part in SPLITS)
                raise _wrong(
                    f"no array {name} in {quoted(file)}, which has {', '.join(arrays.files[:8])}", f"the arrays {expected}"
                )
            return np.asarray(arrays[name])
    except (*UNREADABLE, TypeError, AttributeError) as error:
        raise _unreadable(file, error) from None


@cache
def _labels_in(file: Path, facts: tuple[int, int]) -> dict[str, NDArray[np.int64]]:
    """Labels of all parts; the file is read anew when its facts change. Images are not unpacked: a head tells their shape."""
    labels = {part: _arrays(file, f"{part}_labels") for part in SPLITS}
    for part, given in labels.items():
        shape, dtype = _facts(file, f"{part}_images")
        if given.dtype.kind not in "iu" or given.ndim not in (1, 2) or given.shape[1:] not in ((), (1,)):
            raise _wrong(f"{part}_labels of type {given.dtype} and shape {given.shape} in {quoted(file)}", "one whole number each")
        if shape[:1] != given.shape[:1]:
            raise _wrong(f"{part}_images of shape {shape} for {len(given)} labels in {quoted(file)}", "one image for each label")
        if dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (3,)) or 0 in shape[1:]:
            found = f"{part}_images of type {dtype} and shape {shape} in {quoted(file)}"
            raise _wrong(found, "uint8 of shape (n, height, width) or (n, height, width, 3)")
    return {part: given.astype(np.int64).reshape(-1) for part, given in labels.items()}


def _facts(file: Path, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """What the head of an array says of its shape and type. Raises SourceError."""
    try:
        with zipfile.ZipFile(file) as arrays, arrays.open(f"{name}.npy") as opened:
            shape, _, dtype = _head(opened)
            return shape, dtype
    except KeyError:
        array = _arrays(file, name)  # says what there is
        return array.shape, array.dtype
    except UNREADABLE as error:
        raise _unreadable(file, error) from None


def _pictures(file: Path, name: str, places: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """Images (m, H, W) or (m, H, W, 3) at these places (n,), which rise, some at a time. Raises SourceError.

    The file is unpacked as it is read: the largest holds more than the memory.
    """
    try:
        with zipfile.ZipFile(file) as arrays, arrays.open(f"{name}.npy") as opened:
            shape, by_columns, dtype = _head(opened)
            if by_columns:
                yield _arrays(file, name)[places]
                return
            for start, stop in parts(shape):
                block = np.frombuffer(opened.read((stop - start) * prod(shape[1:]) * dtype.itemsize), dtype)
                own = places[(places >= start) & (places < stop)] - start
                yield block.reshape(stop - start, *shape[1:])[own]
    except UNREADABLE as error:
        raise _unreadable(file, error) from None


def _head(opened: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape of an array, whether columns lie together, and its type."""
    version = np.lib.format.read_magic(opened)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(opened)


def _sized(images: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """(n, H, W) or (n, H, W, 3) as (n, size, size, channels), as image files are."""
    side, mode = (geometry.size, geometry.size), "L" if geometry.channels == 1 else "RGB"
    done = [np.asarray(Image.fromarray(image).convert(mode).resize(side, Image.Resampling.BICUBIC), np.uint8) for image in images]
    return np.stack(done).reshape(-1, *side, geometry.channels) if done else np.empty((0, *side, geometry.channels), np.uint8)
