"""What reading a file gives, and what it is told: pictures at their full depth, how they are read, and why they are not."""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedmerge.errors import first_line

DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, struct.error, zlib.error),
    *(RuntimeError, SystemError),  # of decoders in C
)
"""What readers raise for a file that is truncated or no image."""

MOST_PIXELS = 178_956_970
"""Where Pillow, too, suspects a file that was made to fill the memory."""


class Reading(NamedTuple):
    """How files become pixels: fields of the source. gray_range: None finds one, by `rule`; page: from 1, None takes the first.

    rule: `auto`, `full`, `file`, or two percentiles. frame: of DICOM and NIfTI, from 1. axis, slices: of NIfTI volumes.
    """

    gray_range: tuple[float, float] | None = None
    background: str = "black"
    page: int | None = None
    max_pixels: int = MOST_PIXELS
    rule: str | tuple[float, float] = "auto"
    frame: int | None = None
    axis: str = "axial"
    slices: str | tuple[int, ...] = "middle"

    def determining(self) -> list[Any]:
        """What determines pixels, by its names where it is not as it always was: new keys change no digest of other sources."""
        given = {key: value for key, value in zip(self._fields[4:], self[4:], strict=True) if value != self._field_defaults[key]}
        return [*self[:3], *([given] if given else [])]


REFUSALS = {
    "root": (
        "files that cannot be read",
        "files that may be read. Mend that (permissions, the disk, the network) and run it again",
    ),
    "max_pixels": (
        "images of more pixels than max_pixels",
        "smaller ones. Make them smaller, or raise max_pixels in the source if the memory holds them",
    ),
    "frame": (
        "DICOM or NIfTI files of several frames without the frame asked for",
        "files of one frame, or a frame that all of them have. Set frame in the source, from 1",
    ),
    "slices": ("volumes without a slice asked for", "slices that all of them have. Set slices in the source, from 1, or all"),
    "codec": (
        "DICOM files that are compressed in a way that no installed package reads",
        "a package that does, e.g. pip install python-gdcm; or save them uncompressed, e.g. with gdcmconv --raw",
    ),
    "memory": (
        "images that do not go into the memory of this machine",
        "smaller ones. Make them smaller, or take a machine with more memory",
    ),
    "range": (
        "DICOM files that show their values by a curve (SIGMOID, or a table in their VOI LUT sequence)",
        "one range for all images of the source. Set range in the source: file shows each by its own curve, "
        "{window: [black, white]}, {percentile: [1, 99]} and full show values without it",
    ),
    "page": ("files of several pages without the page asked for", "a page that all of them have. Set page in the source"),
}
"""What stops a source, by the key that it is about: what was found, what is expected, and how to mend it.

codec, memory: of root.
"""


class Refused(Exception):
    """One file that stops the whole source. key: of REFUSALS."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(why)
        self.key = key


class Deep(NamedTuple):
    """An image of more than 8 bits. values: (H, W) or (H, W, 3) as in the file; alpha: (H, W) uint8; inverted: 0 is white.

    window: the least value that is shown as white, or black, by the file itself.
    """

    values: NDArray[Any]
    alpha: NDArray[np.uint8] | None
    inverted: bool
    window: tuple[float, float] | None = None


class Opened(NamedTuple):
    """One picture of a file, upright. pages: how many the file holds, of which this is one.

    burned: what a DICOM file says of text in its pixels: YES, NO or nothing; None of any other file.
    """

    picture: Image.Image | Deep
    orientation: int
    pages: int
    burned: str | None = None


PLAIN = Reading()


@contextmanager
def quiet(package: str) -> Iterator[None]:
    """Without what a package says of headers that are a little wrong, which may hold names, to standard error."""
    log = logging.getLogger(package)
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


@contextmanager
def as_damage(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of a package that are its own, as one of DAMAGE."""
    try:
        yield
    except kinds as error:
        raise ValueError(first_line(error)) from None
