"""All files of a source as pixels: one range of gray values for those deeper than 8 bits, transparency, size; and notes on it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fedmerge.data.cache import Rows
from fedmerge.data.datasets._base import Geometry
from fedmerge.data.datasets._formats import DICOM_ENDS, NIFTI_ENDS, count_of, failure_to_read, page_of, pictures, reason_of
from fedmerge.data.datasets._picture import DAMAGE, REFUSALS, Deep, Opened, Reading, Refused
from fedmerge.errors import DataError, first_of
from fedmerge.system.process import cores, spread

TOPS = (255, 1023, 4095, 16383, 65535)
"""The brightest values of detectors of 8, 10, 12, 14 and 16 bits."""

FEW_LEVELS = 24
"""Gray levels of a picture that is black to the eye: values of 12 bits keep 17 where 16 bits are expected, beside a few dots."""

SAMPLED = 65_536
"""Pixels of an image, at most, whose gray levels are counted."""

MANY = 256
"""Pictures from which on processes of their own decode them."""

TOGETHER = 16
"""Pictures that one process is given at a time, or one file of more."""

MOST_PROCESSES = 8

ALIKE = "in the files' own values, and the same at all hospitals and the target if their values mean the same"


SAMPLES = 2**24
"""Values of all images of a source, at most, from which percentiles are found; of one image no more than 4096."""

RULES = "set range in the source: {window: [black, white]}, {percentile: [1, 99]}, full, or file for each file's own window"


class Extent(NamedTuple):
    """Least and greatest value of the deep images of a file, and whether any of them holds floating-point numbers.

    window: the file's own.
    """

    low: float
    high: float
    floating: bool
    window: tuple[float, float] | None = None


def pixels_of(found: Opened, geometry: Geometry, how: Reading) -> tuple[NDArray[np.uint8], bool]:
    """One image (size, size, channels), in gray or color, resized with antialiasing; and whether it was transparent.

    The whole image is stretched to a square, as in DomainBed.
    """
    picture = found.picture
    image = _shown(picture, _bounds(picture, how), found.orientation) if isinstance(picture, Deep) else picture
    mode = "L" if geometry.channels == 1 else "RGB"
    transparent = False
    if image.has_transparency_data:
        full = image.convert("RGBA")
        transparent = bool((np.asarray(full)[..., 3] < 255).any())
    if transparent:
        image = Image.alpha_composite(Image.new("RGBA", full.size, how.background), full)
    image = image.convert(mode).resize((geometry.size, geometry.size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8).reshape(geometry.size, geometry.size, geometry.channels), transparent


def _bounds(deep: Deep, how: Reading) -> tuple[float, float]:
    """The range by which an image is shown: that of the source, or its own."""
    return how.gray_range or deep.window or (0, 255)


def _finite(deep: Deep) -> NDArray[Any]:
    return deep.values[np.isfinite(deep.values)] if deep.values.dtype.kind == "f" else deep.values.reshape(-1)


def _extent(deep: Deep) -> Extent | None:
    """None if no value is finite, as in a slice beside the brain."""
    values = _finite(deep)
    if not values.size:
        return None
    return Extent(float(values.min()), float(values.max()), deep.values.dtype.kind == "f", deep.window)


def _mapped(deep: Deep, bounds: tuple[float, float]) -> NDArray[np.uint8]:
    """Values as gray levels 0 to 255; what is not a number is as dark as the lower bound."""
    low, high = bounds
    share = (np.nan_to_num(deep.values.astype(np.float64), nan=low, posinf=high, neginf=low) - low) * (255 / (high - low))
    levels = np.rint(share).clip(0, 255).astype(np.uint8)
    return 255 - levels if deep.inverted else levels


def _shown(deep: Deep, bounds: tuple[float, float], orientation: int) -> Image.Image:
    """A deep image as one of 8 bits, upright."""
    image = Image.fromarray(_mapped(deep, bounds))
    if deep.alpha is not None:
        image.putalpha(Image.fromarray(np.ascontiguousarray(deep.alpha)))
    image.getexif()[0x0112] = orientation
    return ImageOps.exif_transpose(image)


def _nearly_lost(deep: Deep, bounds: tuple[float, float]) -> bool:
    """Whether an image of several values keeps a few gray levels only: of many values few, or levels that the eye cannot tell."""
    values = deep.values.reshape(-1)
    sample = deep._replace(values=values[:: max(1, values.size // SAMPLED)])
    levels, before = np.unique(_mapped(sample, bounds)), len(np.unique(sample.values))
    alike = int(levels[-1]) - int(levels[0]) < FEW_LEVELS and before > 1
    return alike or (len(levels) <= FEW_LEVELS and before >= 4 * len(levels))


@dataclass
class _Seen:
    """What the files of a source are, by their positions. refused: names and reasons of those that stop the source, by key.

    pixels: of every picture of a file, until they are among the rows; good: those files. samples: some values of deep images, where
    percentiles are asked for. burned: what DICOM files say of text in their pixels.
    """

    pixels: dict[int, list[NDArray[np.uint8]]] = field(default_factory=dict)
    good: set[int] = field(default_factory=set)
    extents: dict[int, Extent] = field(default_factory=dict)
    samples: list[NDArray[np.float32]] = field(default_factory=list)
    burned: list[str] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)
    pages: dict[int, int] = field(default_factory=dict)
    transparent: set[int] = field(default_factory=set)
    nearly_lost: set[int] = field(default_factory=set)
    refused: dict[str, list[str]] = field(default_factory=dict)

    @contextmanager
    def faults_of(self, at: int, name: str, path: Path) -> Iterator[None]:
        """Sort out by its kind what goes wrong with one file."""
        try:
            yield
        except Refused as error:
            self.refused.setdefault(error.key, []).append(f"{name} ({error})")
        except MemoryError:
            self.refused.setdefault("memory", []).append(name)
        except DAMAGE as error:
            if failure := failure_to_read(path, error):
                self.refused.setdefault("root", []).append(f"{name} ({os.strerror(failure)})")
            else:
                self.broken[at] = reason_of(error, path)

    def add(self, at: int, found: Sequence[Opened], geometry: Geometry, how: Reading) -> None:
        """Pixels of one file."""
        shown = [pixels_of(one, geometry, how) for one in found]
        self.pixels[at] = [pixels for pixels, _ in shown]
        if any(transparent for _, transparent in shown):
            self.transparent.add(at)
        if found[0].pages > 1:
            self.pages[at] = found[0].pages
        if found[0].burned is not None:
            self.burned.append(found[0].burned)

    def measure(self, at: int, deep: Sequence[Deep], sampled: int) -> None:
        """Extent of the deep images of one file, and `sampled` values of each."""
        known = [extent for one in deep if (extent := _extent(one)) is not None]
        if not known:
            raise ValueError("no finite value")
        self.extents[at] = _values(known)
        for values in filter(len, map(_finite, deep)) if sampled else ():
            places = np.linspace(0, values.size - 1, min(sampled, values.size)).round().astype(np.int64)
            self.samples.append(values[places].astype(np.float32))

    def merge(self, other: _Seen, rows: Rows, starts: NDArray[np.int64]) -> None:
        """What a task has seen; its pixels go among the rows, from its files' `starts` on."""
        for at, pixels in other.pixels.items():
            rows.put(int(starts[at]), np.stack(pixels))
        self.good |= other.pixels.keys()
        self.samples += other.samples
        self.burned += other.burned
        for name in ("extents", "broken", "pages", "transparent", "nearly_lost"):
            getattr(self, name).update(getattr(other, name))
        for key, files in other.refused.items():
            self.refused.setdefault(key, []).extend(files)


class _Task(NamedTuple):
    """Some files of a source for one process. files: positions, names, and how many pictures each has.

    deep: the range of their gray values is known. opened: only see whether they can be opened. sampled: values of each deep image
    from which percentiles are found.
    """

    root: Path
    files: tuple[tuple[int, str, int], ...]
    geometry: Geometry
    how: Reading
    deep: bool = False
    opened: bool = False
    sampled: int = 0


def decode_all(
    root: Path, names: Sequence[str], geometry: Geometry, how: Reading, owner: str, rows: Rows
) -> dict[str, NDArray[Any]]:
    """Fill rows (n, size, size, channels) with the files that can be decoded, `good` (n,) the positions in `names` of their files,

    for the others `broken` (m,) their positions and `reasons` (m,) in words, `notes`: what the owner should know, and
    `range` (2,): black and white of deep images, or (0,) where there are none or each has its own, and `deep`: how many files.
    Many are decoded by processes of their own.

    Raises DataError for files that cannot be read or are too large, and for gray values that no range fits.
    """
    seen, where, given = _Seen(), f"site '{owner}': {root}", how.gray_range is not None
    files = tuple((at, name, count_of(root / name, how)) for at, name in enumerate(names))
    ends = np.cumsum([0, *(count for _, _, count in files)])
    rows.begin((int(ends[-1]), geometry.size, geometry.size, geometry.channels), np.uint8)
    sampled = max(16, min(4096, SAMPLES // max(1, len(names)))) if isinstance(how.rule, tuple) else 0
    _decode(seen, rows, _Task(root, files, geometry, how, sampled=sampled), ends)
    if seen.extents and not seen.refused:
        how = how._replace(gray_range=how.gray_range or _decided(seen, how, where))
        _decode(seen, rows, _Task(root, tuple(files[at] for at in seen.extents), geometry, how, deep=True), ends)
    _refuse(seen, how, where, names)
    good = sorted(seen.good)
    counts = np.array([count for _, _, count in files], np.int64)
    rows.keep(np.flatnonzero(np.repeat(np.isin(np.arange(len(files)), good), counts)))
    return {
        "deep": np.array(len(seen.extents)),
        "range": np.array(how.gray_range if seen.extents and how.gray_range else [], np.float64),
        "good": np.repeat(np.array(good, np.int64), counts[good]),
        "broken": np.array(sorted(seen.broken), np.int64),
        "reasons": np.array([seen.broken[at] for at in sorted(seen.broken)], np.str_),
        "notes": np.array(_notes(seen, how, given), np.str_),
    }


def _decode(seen: _Seen, rows: Rows, task: _Task, starts: NDArray[np.int64]) -> None:
    """All files of a task, in order, and what is seen of them; many are decoded by processes of their own."""
    processes = min(cores(), MOST_PROCESSES) if sum(count for _, _, count in task.files) >= MANY else 1
    tasks = (task._replace(files=files, opened=bool(seen.refused)) for files in _together(task.files))
    for found in spread(_look, tasks, processes):
        seen.merge(found, rows, starts)


def _together(files: Sequence[tuple[int, str, int]]) -> Iterator[tuple[tuple[int, str, int], ...]]:
    """Files in order, so many at a time."""
    some: list[tuple[int, str, int]] = []
    for file in files:
        some.append(file)
        if sum(max(1, count) for _, _, count in some) >= TOGETHER:
            yield tuple(some)
            some = []
    if some:
        yield tuple(some)


def _look(task: _Task) -> _Seen:
    """Images of 8 bits as pixels, and of deeper ones what range their values have, until that of all of them is known."""
    seen, geometry, how = _Seen(), task.geometry, task.how
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what matters of it is said by files' names, or in `notes`
        for at, name, count in task.files:
            path = task.root / name
            with seen.faults_of(at, name, path):
                if (task.opened or seen.refused) and not name.casefold().endswith((*DICOM_ENDS, *NIFTI_ENDS)):
                    with page_of(path, how):  # there will be no pixels: only find out what else is wrong
                        continue
                found = pictures(path, how)
                if len(found) != count:
                    raise ValueError(f"{len(found)} pictures, and {count} a moment ago: it is being written")
                deep = [one.picture for one in found if isinstance(one.picture, Deep)]
                if deep and not task.deep:
                    seen.measure(at, deep, task.sampled)
                    continue
                seen.add(at, found, geometry, how)
                if deep and all(_nearly_lost(one, _bounds(one, how)) for one in deep):
                    seen.nearly_lost.add(at)
    return seen


def _decided(seen: _Seen, how: Reading, where: str) -> tuple[float, float] | None:
    """The range of a source that gives none, by its rule; None where each file has its own. Raises DataError."""
    extents = seen.extents
    windows = [one.window for one in extents.values()]
    if how.rule == "file":
        if None not in windows:
            return None
        raise _no_range(where, f"{windows.count(None)} of {len(windows)} deep images without a window of their own", "file")
    if how.rule == "auto":
        named = set(windows) - {None}
        if named and (len(named) > 1 or None in windows):
            rest = f", and {windows.count(None)} images without one" if None in windows else ""
            raise _no_range(where, f"{len(named)} different windows in {len(windows)} images{rest}", "auto")
        return windows[0] or _automatic(extents, where)
    if isinstance(how.rule, str):
        low, high = _values(list(extents.values()))[:2]
    else:
        low, high = np.percentile(np.concatenate(seen.samples), list(how.rule)).tolist()
    if low < high:
        return low, high
    raise _no_range(where, f"one value only, {low:g}", how.rule if isinstance(how.rule, str) else "percentile")


def _no_range(where: str, found: str, rule: str) -> DataError:
    mend = RULES[0].upper() + RULES[1:]
    expected = "one range for all images of the source" if rule != "file" else "a window in every file"
    return DataError(
        f"{where}: found {found} (range: {rule}); expected {expected}. {mend}",
        f"source.range: found no range by '{rule}'; expected {expected}. {mend}",
    )


def _values(extents: Collection[Extent]) -> Extent:
    """The extent of all; the window is that of the first."""
    first = next(iter(extents)).window
    return Extent(min(e.low for e in extents), max(e.high for e in extents), any(e.floating for e in extents), first)


def _automatic(extents: Mapping[int, Extent], where: str) -> tuple[float, float]:
    """The range of the detector that the values of a whole source come from: 0 to 1, or 8 to 16 bits. Raises DataError.

    By steps of bits, and not by the values themselves, so that hospitals with detectors of one kind get the same range.
    """
    low, high, floating, _ = _values(extents.values())
    if low >= 0 and floating and high <= 1:
        return (0, 1)
    if low >= 0 and high <= TOPS[-1]:
        return (0, next(top for top in TOPS if top >= high))
    expected = "a range, because values below 0 or above 65535 do not say what is black and what is white"
    mend = (
        f"Set gray_range: [black, white] in the source, {ALIKE}: [-160, 240] shows soft tissue in Hounsfield units, "
        "[-3, 3] fits z-scores"
    )
    raise DataError(
        f"{where}: found {len(extents)} images with values from {low:g} to {high:g} and no gray_range; expected {expected}. {mend}",
        f"source.gray_range: found none, for images with values below 0 or above 65535; expected {expected}. {mend}",
    )


def _refuse(seen: _Seen, how: Reading, where: str, names: Sequence[str]) -> None:
    """Raises DataError where the source cannot be used as it is."""
    for key, files in seen.refused.items():
        found, expected = REFUSALS[key]
        limit, named = f" ({how.max_pixels})" if key == "max_pixels" else "", first_of(files, 5, "; ")
        raise DataError(
            f"{where}: found {len(files)} {found}{limit}: {named}; expected {expected}",
            f"source.{'root' if key in ('codec', 'memory') else key}: found {found}{limit}; expected {expected}",
        )
    if 2 * len(seen.nearly_lost) > len(seen.extents) > 0:
        mend = f"Set gray_range: [black, white] in the source, {ALIKE}"
        lost = first_of([names[at] for at in sorted(seen.nearly_lost)], 5, "; ")
        raise DataError(
            f"{where}: found {len(seen.nearly_lost)} images of {FEW_LEVELS} gray levels or fewer by {_range_words(seen, how)}: "
            f"{lost}; expected a range that fits the values. {mend}",
            f"source.gray_range: found a range that leaves most images {FEW_LEVELS} gray levels or fewer; expected one that fits "
            f"the values. {mend}",
        )


def _range_words(seen: _Seen, how: Reading) -> str:
    found, (black, white) = _values(seen.extents.values()), how.gray_range or (0, 255)
    if how.gray_range is None:
        return f"the window of each file, for values from {found.low:g} to {found.high:g}"
    return f"the range {black:g} (black) to {white:g} (white), for values from {found.low:g} to {found.high:g}"


def _notes(seen: _Seen, how: Reading, given: bool) -> list[str]:
    """What is done to images that are not simply shown as they are. given: the range was."""
    notes: list[str] = []
    if seen.extents:
        rest = f"; {n} of 8 bits stay as they are" if (n := len(seen.good - seen.extents.keys())) else ""
        fix = "" if given else f". To fix it, set gray_range, {ALIKE}" if how.rule == "auto" else f" (range: {_rule_words(how)})"
        notes.append(f"{len(seen.extents)} images of more than 8 bits are shown by {_range_words(seen, how)}{rest}{fix}")
    elif given:
        notes.append("no image has more than 8 bits, so that gray_range changes nothing")
    if seen.nearly_lost:
        notes.append(f"of {len(seen.nearly_lost)} of these images that range leaves {FEW_LEVELS} gray levels or fewer")
    if seen.transparent:
        notes.append(f"{len(seen.transparent)} images with transparency are shown on {how.background} (background)")
    if seen.burned:
        yes = f", which {n} of them say they have" if (n := seen.burned.count("YES")) else ""
        notes.append(f"{len(seen.burned)} files are DICOM: text burned into the pixels{yes}, such as names, is not looked for")
    if seen.pages:
        page = f"page {how.page or 1} of each is read, and no other (page)"
        notes.append(f"{len(seen.pages)} files hold several pages or frames, up to {max(seen.pages.values())}: {page}")
    return notes


def _rule_words(how: Reading) -> str:
    return how.rule if isinstance(how.rule, str) else f"percentiles {how.rule[0]:g} and {how.rule[1]:g}"
