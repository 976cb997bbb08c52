"""What a process is at, in a file, for those who watch it from another process."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedmerge.system.files import atomic_write

EVERY_S = 1.0
"""Least time between two writes of what changes all the time."""


class StatusFile:
    """Facts by name, as JSON. Nobody depends on the file: where it cannot be written, the process goes on without it.

    path: None for a process that nobody watches. Threads may share it.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._written = -EVERY_S

    def put(self, **facts: Any) -> None:
        """Set some, and write at once."""
        with self._lock:
            self.facts |= facts
            self._write()

    def put_below(self, name: str, key: str, value: Any, now: bool = False) -> None:
        """Set one of the facts below `name`; it is written at once if `now`, and otherwise when the last write is a second old."""
        with self._lock:
            self.facts.setdefault(name, {})[key] = value
            if now or time.monotonic() >= self._written + EVERY_S:
                self._write()

    def _write(self) -> None:
        if self.path is not None:
            with suppress(OSError):
                atomic_write(self.path, json.dumps(self.facts))
            self._written = time.monotonic()
