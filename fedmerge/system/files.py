"""Files that only their owner may read."""

from __future__ import annotations

import os
from pathlib import Path

MODE = 0o600


def write_secret(file: Path, content: bytes) -> None:
    """Write `content` to `file`, whole or not at all, readable by its owner alone from the first byte on. Raises OSError."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}.draft")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE), "wb") as opened:
        opened.write(content)
    draft.replace(file)
