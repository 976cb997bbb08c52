"""Decoded or rendered pixels on their owner's disk, so that they are made once."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def folder() -> Path:
    """`FEDMERGE_CACHE`, else `fedmerge` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "fedmerge"
    return Path(os.environ.get("FEDMERGE_CACHE", default)).expanduser()


def cached(owner: str, key: str, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """The array that `make` returns, from the owner's cache if it is there and readable.

    A cache that cannot be written is no error: the pixels are made again next time.
    """
    file = folder() / owner / f"{key}.npz"
    try:
        with np.load(file) as stored:
            return np.asarray(stored["pixels"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        pixels = make()
    with suppress(OSError), tempfile.TemporaryDirectory(dir=_made(file.parent), prefix=".draft-") as draft:
        np.savez(Path(draft) / "pixels.npz", pixels=pixels)
        (Path(draft) / "pixels.npz").replace(file)
    return pixels


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
