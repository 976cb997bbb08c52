"""Decoded or rendered pixels on their owner's disk, so that they are made once."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from fedmerge.system.files import atomic

Arrays = dict[str, NDArray[Any]]


def folder() -> Path:
    """`FEDMERGE_CACHE`, else `fedmerge` in the user's cache folder."""
    given = os.environ.get("FEDMERGE_CACHE")
    return Path(given).expanduser() if given else user_cache_path("fedmerge", appauthor=False)


def cached(owner: str, key: str, make: Callable[[], Arrays]) -> Arrays:
    """The named arrays that `make` returns, from the owner's cache if they are there and readable.

    A cache that cannot be read or written is no error: the arrays are made again.
    """
    file = folder() / owner / f"{key}.npz"
    try:
        with np.load(file) as stored:
            return dict(stored)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        arrays = make()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic(file) as draft, draft.open("wb") as opened:
            np.savez(opened, **arrays)  # type: ignore[arg-type] # the stub takes them for options
    return arrays
