"""One file as pictures, at their full depth: what Pillow reads here, DICOM and NIfTI by files of their own.

A file that cannot be read now (no permission, a disk that fails) is told from one that is no image: only the latter is a
property of the file, which may be left out and remembered.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fedmerge.data.datasets._dicom import dicom
from fedmerge.data.datasets._nifti import nifti, slices_across
from fedmerge.data.datasets._picture import DAMAGE, PLAIN, Deep, Opened, Reading, Refused

ONE_PICTURE = ("MPO", "PSD")
"""Formats whose further frames are previews or layers of the first."""

STEPS = {"L;2": 85, "L;4": 17}
"""Step between gray levels of 2 and 4 bits, by which Pillow stretches pixels but not the level that is transparent."""

DICOM_ENDS = (".dcm", ".dicom")
NIFTI_ENDS = (".nii", ".nii.gz")


def pictures(path: Path, how: Reading = PLAIN) -> list[Opened]:
    """All pictures that a file gives: slices of a volume, one of any other. Raises one of DAMAGE, or Refused.

    DICOM and NIfTI are told by their ends, DICOM also by what it holds. Raises MissingExtra where they cannot be read.
    """
    name = path.name.casefold()
    if name.endswith(NIFTI_ENDS):
        return nifti(path, how)
    if name.endswith(DICOM_ENDS):
        return [dicom(path, how)]
    try:
        return [read(path, how)]
    except UnidentifiedImageError:
        with path.open("rb") as file:
            if file.read(132)[128:] != b"DICM":
                raise
    return [dicom(path, how)]


def count_of(path: Path, how: Reading = PLAIN) -> int:
    """How many pictures a file gives, as far as its head tells: none where it cannot be read."""
    if not path.name.casefold().endswith(NIFTI_ENDS) or how.slices == "middle":
        return 1
    if not isinstance(how.slices, str):
        return len(how.slices)
    with suppress(*DAMAGE):
        return slices_across(path, how.axis)
    return 0


def read(path: Path, how: Reading = PLAIN) -> Opened:
    """One picture of a file, at its full depth. Raises one of DAMAGE, or Refused."""
    with page_of(path, how) as (opened, pages):
        _in_order_of_bytes(opened)
        if (raw := _raw_mode(opened)) in STEPS and "transparency" in opened.info:
            opened.info["transparency"] *= STEPS[raw]
        deep = _deep(path, how, opened, raw)
        if deep is None:
            return Opened(ImageOps.exif_transpose(opened), 1, pages)
        return Opened(deep, int(opened.getexif().get(0x0112, 1)), pages)


@contextmanager
def page_of(path: Path, how: Reading) -> Iterator[tuple[Image.Image, int]]:
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
    if max(tags.get(258, (8,))) > 8 and tags.get(284) == 2:  # bits of a sample, and how colors lie
        raise ValueError(
            "16 bits a sample in a plane for each color, which cannot be read at its depth; save it with colors side by side"
        )
    return _deep_color(path, how, opened, raw) if ";16" in raw else None


def _raw_mode(opened: Any) -> str:
    """Pillow's name for how samples lie in the file; empty for formats that have none."""
    if not getattr(opened, "tile", None):
        return ""
    args = opened.tile[0].args
    return str(args[0] if isinstance(args, tuple) and args else args or "")


def _in_order_of_bytes(opened: Any) -> None:
    """Take packed values of a TIFF in this machine's order of bytes, in which libtiff gives them; Pillow turns some kinds round."""
    tiles = getattr(opened, "tile", None) or []
    if any(tile.codec_name == "libtiff" for tile in tiles):
        own = {f"{kind}B{end}": f"{kind}N{end}" for kind, end in (("I;16", "S"), ("I;32", "S"), ("F;32", "F"))}
        opened.tile = [tile._replace(args=(own.get(tile.args[0], tile.args[0]), *tile.args[1:])) for tile in tiles]


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
    with page_of(path, how) as (opened, _):
        image: Any = opened
        image.tile = [tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw) for tile in image.tile]
        return np.asarray(image)


def failure_to_read(path: Path, error: Exception) -> int | None:
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


def reason_of(error: Exception, path: Path) -> str:
    """Why a file is no image that can be used."""
    if not isinstance(error, UnidentifiedImageError):
        return " ".join(str(error).split()) or type(error).__name__
    with suppress(OSError), path.open("rb") as file:
        start = file.read(132)
        if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return "a TIFF of a kind that Pillow cannot read; it reads 8 and 16 bits, and one channel of 32-bit floats"
    return "no image"
