"""Decoded or rendered pixels on their owner's disk, so that they are made once."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def folder() -> Path:
    """`FEDMERGE_CACHE`, else `fedmerge` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "fedmerge"
    return Path(os.environ.get("FEDMERGE_CACHE", default)).expanduser()


def cached(owner: str, key: str, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """The array that `make` returns, from the owner's cache if it is there and readable. A folder that cannot be written is no error."""
    file = folder() / owner / f"{key}.npz"
    try:
        with np.load(file) as stored:
            return np.asarray(stored["pixels"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        pixels = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".draft", delete=False) as draft:
            np.savez(draft, pixels=pixels)
        Path(draft.name).replace(file)
    except OSError:  # a full or read-only disk: the pixels are made again next time
        Path(draft.name).unlink(missing_ok=True) if "draft" in locals() else None
    return pixels
