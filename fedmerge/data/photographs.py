"""Decoding image files, and naming those that cannot be decoded."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fedmerge.data.source import Geometry

DAMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises for a file that is truncated, no image, or too large to be one."""


def decode(path: Path, geometry: Geometry) -> NDArray[np.uint8]:
    """One image (size, size, channels), turned as its EXIF says, in grey or colour, resized with antialiasing.

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
