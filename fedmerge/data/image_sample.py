"""What a few images of a folder are like: their size, channels, formats, and the range of values that they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmerge.data.datasets._formats import DICOM_ENDS, NIFTI_ENDS, pictures, reason_of
from fedmerge.data.datasets._image_files import ENDS
from fedmerge.data.datasets._picture import DAMAGE, MOST_PIXELS, REFUSALS, Deep, Opened, Reading, Refused
from fedmerge.errors import DataError, quoted

SAMPLE = 48
"""Images that are opened."""

WITHOUT = {"frame": 1, "range": "file"}
"""Keys without which some files are refused, and what is taken for them."""


@dataclass(frozen=True)
class Look:
    """What a sample of images is like. side: the median of their shorter sides, pixels. keys: what a source has to say of them."""

    side: int
    channels: int
    words: str
    keys: dict[str, Any]


def look(paths: Sequence[Path]) -> Look:
    """Size, channels and depth of a sample of these images. Raises DataError if none of it can be read, and MissingExtra."""
    paths = paths[:: max(1, len(paths) // SAMPLE)]
    keys: dict[str, Any] = {}
    opened, why = list[Opened](), ""
    for path in paths:
        try:
            found, needed = _pictures(path)
        except Refused as error:
            raise DataError(f"--images: {quoted(path)}: found {error}; expected {_mended(error)}") from None
        except DAMAGE as error:
            why = f"{quoted(path)} ({reason_of(error, path)})"
            continue
        opened += found
        keys |= needed
    if not opened:
        raise DataError(f"--images: found no image that can be read among {len(paths)}, e.g. {why}; expected PNG, JPEG, DICOM ...")
    sides = [_size(one) for one in opened]
    side = int(np.median([min(size) for size in sides]))
    height, width = (int(np.median([size[axis] for size in sides])) for axis in (0, 1))
    channels = 3 if any(_is_colored(one) for one in opened) else 1
    deep = [one.picture for one in opened if isinstance(one.picture, Deep)]
    kinds = sorted({_kind(path) for path in paths})
    words = (
        f"{', '.join(kinds)} of {height} x {width} pixels (median of {len(opened)} images), {'color' if channels == 3 else 'gray'}"
    )
    words += ", more than 8 bits" if deep else ""
    if deep and "range" not in keys and (bounds := _bounds(deep)):
        keys["gray_range"] = bounds
        words += f", shown from {bounds[0]:g} (black) to {bounds[1]:g} (white)"
    return Look(side, channels, words, keys)


def _pictures(path: Path) -> tuple[list[Opened], dict[str, Any]]:
    """All pictures of a file, and the keys that a source needs for it. Raises one of DAMAGE, or Refused."""
    keys: dict[str, Any] = {}
    while True:
        try:
            return pictures(path, Reading(frame=keys.get("frame"), rule=keys.get("range", "auto"))), keys
        except MemoryError:
            raise Refused("memory", REFUSALS["memory"][0]) from None
        except Refused as error:
            if error.key not in WITHOUT or error.key in keys:
                raise
            keys[error.key] = WITHOUT[error.key]


def _mended(error: Refused) -> str:
    """What is expected of a file, and how to mend it where no site file is there yet."""
    if error.key != "max_pixels":
        return REFUSALS[error.key][1]
    mend = (
        "Make such images smaller, or move them out of the folder; the key max_pixels of a source that you write yourself raises it"
    )
    return f"at most {MOST_PIXELS}, so that the memory holds them. {mend}"


def _kind(path: Path) -> str:
    name = path.name.casefold()
    if name.endswith(NIFTI_ENDS):
        return "NIfTI"
    return "DICOM" if name.endswith(DICOM_ENDS) or not name.endswith(ENDS) else path.suffix[1:].upper()


def _size(one: Opened) -> tuple[int, int]:
    if isinstance(one.picture, Deep):
        return one.picture.values.shape[:2]
    return one.picture.height, one.picture.width


def _is_colored(one: Opened) -> bool:
    """Whether an image is in color, and not gray values three times."""
    values = one.picture.values if isinstance(one.picture, Deep) else np.asarray(one.picture.convert("RGB"))
    return values.ndim == 3 and bool((values[..., :1] != values[..., 1:3]).any())


def _bounds(deep: Sequence[Deep]) -> list[float]:
    """Black and white of deep images, where the source finds none by itself: their one window, else 1 to 99 in 100 values."""
    windows = {one.window for one in deep}
    if len(windows) == 1 and (own := windows.pop()):
        return list(own)
    values = np.concatenate([_some(one) for one in deep])
    if not values.size:
        return []
    plain = all(one.window is None for one in deep) and values.min() >= 0
    if plain and values.max() <= 65535:
        return []
    low, high = (float(f"{value:.3g}") for value in np.percentile(values, [1, 99]))
    return [low, high] if low < high else [float(values.min()), float(values.max()) + 1]


def _some(one: Deep) -> np.ndarray[Any, Any]:
    values = one.values.reshape(-1)[:: max(1, one.values.size // 4096)].astype(np.float64)
    return values[np.isfinite(values)]
