"""One image file as pixels: values deeper than 8 bits, transparency, pages, size; and the same for all files of a source.

A file that cannot be read now (no permission, a disk that fails) is told from one that is no image: only the latter is a
property of the file, which may be left out and remembered.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fedmerge.data.cache import Rows
from fedmerge.data.datasets._base import Geometry
from fedmerge.errors import DataError
from fedmerge.system.process import cores, spread

DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, struct.error, zlib.error),
    *(RuntimeError, SystemError),  # of decoders in C
)
"""What Pillow raises for a file that is truncated or no image."""

MOST_PIXELS = 178_956_970
"""Where Pillow, too, suspects a file that was made to fill the memory."""

TOPS = (255, 1023, 4095, 16383, 65535)
"""The brightest values of detectors of 8, 10, 12, 14 and 16 bits."""

FEW_LEVELS = 24
"""Gray levels of a picture that is black to the eye: values of 12 bits keep 17 where 16 bits are expected, beside a few dots."""

SAMPLED = 65_536
"""Pixels of an image, at most, whose gray levels are counted."""

ONE_PICTURE = ("MPO", "PSD")
"""Formats whose further frames are previews or layers of the first."""

STEPS = {"L;2": 85, "L;4": 17}
"""Step between gray levels of 2 and 4 bits, by which Pillow stretches pixels but not the level that is transparent."""

MANY = 256
"""Files from which on processes of their own decode them."""

FILES = 16
"""Files that one process is given at a time."""

MOST_PROCESSES = 8

ALIKE = "in the files' own values, and the same at all hospitals and the target if their values mean the same"


class Reading(NamedTuple):
    """How files become pixels: fields of the source. gray_range: None finds one; page: from 1, None takes the first."""

    gray_range: tuple[float, float] | None = None
    background: str = "black"
    page: int | None = None
    max_pixels: int = MOST_PIXELS


REFUSALS = {
    "root": (
        "files that cannot be read",
        "files that may be read. Mend that (permissions, the disk, the network) and run it again",
    ),
    "max_pixels": (
        "images of more pixels than max_pixels",
        "smaller ones. Make them smaller, or raise max_pixels in the source if the memory holds them",
    ),
    "page": ("files of several pages without the page asked for", "a page that all of them have. Set page in the source"),
}
"""What stops a source, by the key that it is about: what was found, what is expected, and how to mend it."""


class Refused(Exception):
    """One file that stops the whole source. key: of REFUSALS."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(why)
        self.key = key


class Deep(NamedTuple):
    """An image of more than 8 bits. values: (H, W) or (H, W, 3) as in the file; alpha: (H, W) uint8; inverted: 0 is white."""

    values: NDArray[Any]
    alpha: NDArray[np.uint8] | None
    inverted: bool


class Opened(NamedTuple):
    """One picture of a file, upright. pages: how many the file holds."""

    picture: Image.Image | Deep
    orientation: int
    pages: int


class Extent(NamedTuple):
    """Least and greatest value of deep images, and whether any of them holds floating-point numbers."""

    low: float
    high: float
    floating: bool


PLAIN = Reading()


def read(path: Path, how: Reading = PLAIN) -> Opened:
    """One picture of a file, at its full depth. Raises one of DAMAGE, or Refused."""
    with _page(path, how) as (opened, pages):
        if (raw := _raw_mode(opened)) in STEPS and "transparency" in opened.info:
            opened.info["transparency"] *= STEPS[raw]
        deep = _deep(path, how, opened, raw)
        if deep is None:
            return Opened(ImageOps.exif_transpose(opened), 1, pages)
        return Opened(deep, int(opened.getexif().get(0x0112, 1)), pages)


def pixels_of(found: Opened, geometry: Geometry, how: Reading) -> tuple[NDArray[np.uint8], bool]:
    """One image (size, size, channels), in gray or color, resized with antialiasing; and whether it was transparent.

    The whole image is stretched to a square, as in DomainBed.
    """
    picture = found.picture
    image = _shown(picture, how.gray_range or (0, 255), found.orientation) if isinstance(picture, Deep) else picture
    mode = "L" if geometry.channels == 1 else "RGB"
    transparent = False
    if image.has_transparency_data:
        full = image.convert("RGBA")
        transparent = bool((np.asarray(full)[..., 3] < 255).any())
    if transparent:
        image = Image.alpha_composite(Image.new("RGBA", full.size, how.background), full)
    image = image.convert(mode).resize((geometry.size, geometry.size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8).reshape(geometry.size, geometry.size, geometry.channels), transparent


@contextmanager
def _page(path: Path, how: Reading) -> Iterator[tuple[Image.Image, int]]:
    """The chosen page of a file, and the number of pages. A file of one page is read whatever page is asked for."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours is the limit: one error, and no warning below it
    try:
        # A file and not its path: of a path Pillow maps raw TIFF into memory, and scrambles those that lie on their side
        with path.open("rb") as file, Image.open(file) as opened:
            pages = 1
            if opened.format not in ONE_PICTURE:
                with suppress(*DAMAGE):  # rubbish behind a first page that is whole
                    pages = getattr(opened, "n_frames", 1)
            if pages > 1 and how.page is not None:
                if how.page > pages:
                    raise Refused("page", f"{pages} pages, and no page {how.page}")
                opened.seek(how.page - 1)
            if opened.width * opened.height > how.max_pixels:
                raise Refused("max_pixels", f"{opened.width} x {opened.height} = {opened.width * opened.height} pixels")
            yield opened, pages
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _deep(path: Path, how: Reading, opened: Any, raw: str) -> Deep | None:
    """The values of an image of more than 8 bits a sample; None for any other."""
    tags = getattr(opened, "tag_v2", {})
    inverted, signed = tags.get(262) == 0, tags.get(339, (1,))[0] == 2  # photometric interpretation and sample format of TIFF
    transparent = opened.info.get("transparency")
    if opened.mode.startswith(("I", "F")):
        values = np.asarray(opened)
        if raw.startswith("I;32") and tags and not signed:
            values = values.view(np.uint32)
        if opened.format == "PPM" and opened.mode == "I":  # Pillow has stretched them to 16 bits
            values = np.rint(values * (_declared_top(path) / 65535)).astype(np.uint16)
        alpha = None if transparent is None else np.where(values == transparent, 0, 255).astype(np.uint8)
        return Deep(values, alpha, inverted)
    if opened.mode == "L" and signed and tags.get(258) == (8,):
        return Deep(np.asarray(opened).view(np.int8), None, inverted)
    if opened.format == "PPM" and opened.mode == "RGB" and _declared_top(path) > 255:
        return Deep(_deep_ppm(path, opened), None, False)
    return _deep_color(path, how, opened, raw) if ";16" in raw else None


def _raw_mode(opened: Any) -> str:
    """Pillow's name for how samples lie in the file; empty for formats that have none."""
    if not getattr(opened, "tile", None):
        return ""
    args = opened.tile[0].args
    return str(args[0] if isinstance(args, tuple) and args else args or "")


def _words(data: bytes) -> list[bytes]:
    """What stands in a text of the PGM and PPM family, without its comments."""
    return b" ".join(line.partition(b"#")[0] for line in data.splitlines()).split()


def _declared_top(path: Path) -> int:
    """The greatest value that a file of the PGM and PPM family declares."""
    with path.open("rb") as file:
        return int(_words(file.read(8192))[3])


def _deep_ppm(path: Path, opened: Any) -> NDArray[Any]:
    """Colors of a PPM of 16 bits, which Pillow would cut to 8."""
    tile, size = opened.tile[0], opened.width * opened.height * 3
    if tile.codec_name == "ppm":
        values = np.fromfile(path, ">u2", size, offset=tile.offset)
    else:
        values = np.array(_words(path.read_bytes())[4 : 4 + size]).astype(np.uint16)
    if len(values) < size:
        raise ValueError("image file is truncated")
    return values.reshape(opened.height, opened.width, 3)


def _deep_color(path: Path, how: Reading, opened: Any, raw: str) -> Deep:
    """Colors of 16 bits. Pillow keeps the upper byte of each sample only: the lower one is read as if bytes lay the other way."""
    if raw == "LA;16B":  # of PNG: two samples of two bytes lie where four of one byte would
        bytes_ = _unpacked(path, how, "RGBA").astype(np.uint16)
        return Deep(bytes_[..., 0] << 8 | bytes_[..., 1], bytes_[..., 2].astype(np.uint8), False)
    if raw[:-1] not in ("RGB;16", "RGBA;16", "RGBX;16"):
        raise ValueError(f"16 bits a sample as {raw}, which cannot be read at its depth")
    little = raw.endswith("L") or (raw.endswith("N") and sys.byteorder == "little")
    lower = _unpacked(path, how, raw[:-1] + ("B" if little else "L"))
    upper = np.asarray(opened)
    values = upper[..., :3].astype(np.uint16) << 8 | lower[..., :3]
    alpha = upper[..., 3] if raw.startswith("RGBA") else None
    if (clear := opened.info.get("transparency")) is not None:
        alpha = np.where((values == np.array(clear)).all(-1), 0, 255).astype(np.uint8)
    return Deep(values, alpha, False)


def _unpacked(path: Path, how: Reading, raw: str) -> NDArray[np.uint8]:
    """The pixels of a file as if its samples lay as `raw` says."""
    with _page(path, how) as (opened, _):
        image: Any = opened
        image.tile = [tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw) for tile in image.tile]
        return np.asarray(image)


def _extent(deep: Deep) -> Extent:
    """Raises ValueError if no value is finite."""
    values, floating = deep.values, deep.values.dtype.kind == "f"
    if floating:
        values = values[np.isfinite(values)]
    if not values.size:
        raise ValueError("no finite value")
    return Extent(float(values.min()), float(values.max()), floating)


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

    pixels: of the files of one task, until they are among the rows.
    """

    pixels: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    good: set[int] = field(default_factory=set)
    extents: dict[int, Extent] = field(default_factory=dict)
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
        except DAMAGE as error:
            if failure := _failure_to_read(path, error):
                self.refused.setdefault("root", []).append(f"{name} ({os.strerror(failure)})")
            else:
                self.broken[at] = _reason(error, path)

    def add(self, at: int, found: Opened, geometry: Geometry, how: Reading) -> None:
        """Pixels of one file."""
        self.pixels[at], transparent = pixels_of(found, geometry, how)
        if transparent:
            self.transparent.add(at)
        if found.pages > 1:
            self.pages[at] = found.pages

    def merge(self, other: _Seen, rows: Rows) -> None:
        """What a task has seen; its pixels go among the rows."""
        for at, pixels in other.pixels.items():
            rows.put(at, pixels[None])
        self.good |= other.pixels.keys()
        for name in ("extents", "broken", "pages", "transparent", "nearly_lost"):
            getattr(self, name).update(getattr(other, name))
        for key, files in other.refused.items():
            self.refused.setdefault(key, []).extend(files)


class _Task(NamedTuple):
    """Some files of a source for one process. files: positions and names; deep: the range of their gray values is known;

    opened: only see whether they can be opened.
    """

    root: Path
    files: tuple[tuple[int, str], ...]
    geometry: Geometry
    how: Reading
    deep: bool
    opened: bool = False


def decode_all(
    root: Path, names: Sequence[str], geometry: Geometry, how: Reading, owner: str, rows: Rows
) -> dict[str, NDArray[Any]]:
    """Fill rows (n, size, size, channels) with the files that can be decoded, `good` (n,) their positions in `names`,

    for the others `broken` (m,) their positions and `reasons` (m,) in words, and `notes`: what the owner should know.
    Many files are decoded by processes of their own. rows: as many as there are names.

    Raises DataError for files that cannot be read or are too large, and for gray values that no range fits.
    """
    seen, where, given = _Seen(), f"site '{owner}': {root}", how.gray_range is not None
    _decode(seen, rows, _Task(root, tuple(enumerate(names)), geometry, how, deep=False))
    if seen.extents and not seen.refused:
        how = how._replace(gray_range=how.gray_range or _automatic(seen.extents, where))
        deep = tuple((at, names[at]) for at in seen.extents)
        _decode(seen, rows, _Task(root, deep, geometry, how, deep=True))
    _refuse(seen, how, where, names)
    good = np.array(sorted(seen.good), np.int64)
    rows.keep(good)
    return {
        "good": good,
        "broken": np.array(sorted(seen.broken), np.int64),
        "reasons": np.array([seen.broken[at] for at in sorted(seen.broken)], np.str_),
        "notes": np.array(_notes(seen, how, given), np.str_),
    }


def _decode(seen: _Seen, rows: Rows, task: _Task) -> None:
    """All files of a task, in order, and what is seen of them; many are decoded by processes of their own."""
    parts = (
        task._replace(files=task.files[start : start + FILES], opened=bool(seen.refused))
        for start in range(0, len(task.files), FILES)
    )
    processes = min(cores(), MOST_PROCESSES) if len(task.files) >= MANY else 1
    for found in spread(_look, parts, processes):
        seen.merge(found, rows)


def _look(task: _Task) -> _Seen:
    """Images of 8 bits as pixels, and of deeper ones what range their values have, until that of all of them is known."""
    seen = _Seen()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what matters of it is said by files' names, or in `notes`
        for at, name in task.files:
            path = task.root / name
            with seen.faults_of(at, name, path):
                if task.opened or seen.refused:  # there will be no pixels: only find out what else is wrong
                    with _page(path, task.how):
                        continue
                found = read(path, task.how)
                if isinstance(found.picture, Deep) and not task.deep:
                    seen.extents[at] = _extent(found.picture)
                    continue
                seen.add(at, found, task.geometry, task.how)
                if isinstance(found.picture, Deep) and task.how.gray_range and _nearly_lost(found.picture, task.how.gray_range):
                    seen.nearly_lost.add(at)
    return seen


def _failure_to_read(path: Path, error: Exception) -> int | None:
    """The system's number of what keeps a file from being read; None where its content is at fault.

    Decoders in C lose that number, and a damaged file that names a place outside of itself gives EINVAL: both are settled by
    reading the file once more.
    """
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return error.errno
    try:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    except OSError as failure:
        return failure.errno
    return None


def _reason(error: Exception, path: Path) -> str:
    """Why a file is no image that can be used."""
    if not isinstance(error, UnidentifiedImageError):
        return str(error) or type(error).__name__
    with suppress(OSError), path.open("rb") as file:
        start = file.read(132)
        if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return "a TIFF of a kind that Pillow cannot read; it reads 8 and 16 bits, and one channel of 32-bit floats"
        if start[128:] == b"DICM":
            return "DICOM, which is not read; export it as PNG or TIFF"
    return "no image"


def _values(extents: Collection[Extent]) -> Extent:
    """The extent of all."""
    return Extent(min(e.low for e in extents), max(e.high for e in extents), any(e.floating for e in extents))


def _automatic(extents: Mapping[int, Extent], where: str) -> tuple[float, float]:
    """The range of the detector that the values of a whole source come from: 0 to 1, or 8 to 16 bits. Raises DataError.

    By steps of bits, and not by the values themselves, so that hospitals with detectors of one kind get the same range.
    """
    low, high, floating = _values(extents.values())
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
        limit = f" ({how.max_pixels})" if key == "max_pixels" else ""
        raise DataError(
            f"{where}: found {len(files)} {found}{limit}: {shortened(files)}; expected {expected}",
            f"source.{key}: found {found}{limit}; expected {expected}",
        )
    if how.gray_range and 2 * len(seen.nearly_lost) > len(seen.extents):
        mend = f"Set gray_range: [black, white] in the source, {ALIKE}"
        lost = shortened([names[at] for at in sorted(seen.nearly_lost)])
        raise DataError(
            f"{where}: found {len(seen.nearly_lost)} images of {FEW_LEVELS} gray levels or fewer by {_range_words(seen, how)}: "
            f"{lost}; expected a range that fits the values. {mend}",
            f"source.gray_range: found a range that leaves most images {FEW_LEVELS} gray levels or fewer; expected one that fits "
            f"the values. {mend}",
        )


def _range_words(seen: _Seen, how: Reading) -> str:
    found, (black, white) = _values(seen.extents.values()), how.gray_range or (0, 255)
    return f"the range {black:g} (black) to {white:g} (white), for values from {found.low:g} to {found.high:g}"


def _notes(seen: _Seen, how: Reading, given: bool) -> list[str]:
    """What is done to images that are not simply shown as they are. given: the range was."""
    notes: list[str] = []
    if seen.extents:
        rest = f"; {n} of 8 bits stay as they are" if (n := len(seen.good - seen.extents.keys())) else ""
        fix = "" if given else f". To fix it, set gray_range, {ALIKE}"
        notes.append(f"{len(seen.extents)} images of more than 8 bits are shown by {_range_words(seen, how)}{rest}{fix}")
    elif given:
        notes.append("no image has more than 8 bits, so that gray_range changes nothing")
    if seen.nearly_lost:
        notes.append(f"of {len(seen.nearly_lost)} of these images that range leaves {FEW_LEVELS} gray levels or fewer")
    if seen.transparent:
        notes.append(f"{len(seen.transparent)} images with transparency are shown on {how.background} (background)")
    if seen.pages:
        page = f"page {how.page or 1} of each is read, and no other (page)"
        notes.append(f"{len(seen.pages)} files hold several pages or frames, up to {max(seen.pages.values())}: {page}")
    return notes


def shortened(names: Sequence[str]) -> str:
    """The first five, and how many more there are."""
    return "; ".join(names[:5]) + (f"; and {len(names) - 5} more" if len(names) > 5 else "")
