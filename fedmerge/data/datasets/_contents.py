"""Which files are which, by what they hold: bytes are hashed once, for as long as the files stay as they are."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fedmerge.data.cache import Arrays, cached
from fedmerge.data.datasets._image_files import ImageFile
from fedmerge.system.files import SETTLED_NS, file_digest
from fedmerge.system.process import cores


class _UnreadableError(Exception):
    def __init__(self, digests: tuple[str, ...]) -> None:
        super().__init__()
        self.digests = digests


def digests(owner: str, root: Path, items: Sequence[ImageFile]) -> tuple[str, ...]:
    """A sha256 of every file's bytes, and nothing for one that cannot be read. items: below the root.

    The owner's cache keeps them while the files' facts stay the same. Nothing is kept where a file could not be read, which may be
    otherwise the next time, or has only just been changed, so that its times may not tell of another change.
    """
    paths = [root / item.path for item in items]
    if not paths or max(item.changed for item in items) + SETTLED_NS > time.time_ns():
        return _read(paths)
    facts = [(item.path, item.device, item.inode, item.size, item.modified, item.changed) for item in items]
    key = hashlib.sha256(json.dumps(["contents", str(root.resolve()), facts]).encode()).hexdigest()

    def make() -> Arrays:
        found = _read(paths)
        if "" in found:
            raise _UnreadableError(found)
        return {"digests": np.array(found)}

    try:
        return tuple(cached(owner, key, make)["digests"].tolist())
    except _UnreadableError as error:
        return error.digests


def _read(paths: Sequence[Path]) -> tuple[str, ...]:
    with ThreadPoolExecutor(cores()) as readers:  # hashing leaves Python's lock to others
        return tuple(readers.map(file_digest, paths))
