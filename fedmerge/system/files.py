"""Files and folders that appear whole or not at all, and files that only their owner may read."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODE = 0o600


@contextmanager
def atomic(file: Path, mode: int | None = None) -> Iterator[Path]:
    """A draft beside `file`, which takes its place when the block ends, and is removed if anything fails.

    mode: of the draft from its first byte on; None leaves it to whoever creates it. No two drafts have the same name, so that
    threads and processes may write the same file: one of them wins.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.draft")
    try:
        if mode is not None:
            os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        yield draft
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def atomic_write(file: Path, content: str | bytes, mode: int | None = None) -> None:
    """Write `content` to `file`, text as UTF-8 with the line ends it has; mode: of a file that is not for all. Raises OSError."""
    with atomic(file, mode) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A draft beside `folder`, which becomes it when the block ends; where another process was first, its folder stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield draft
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_secret(file: Path, content: bytes) -> None:
    """Write `content` to `file`, whole or not at all, readable by its owner alone from the first byte on. Raises OSError."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    atomic_write(file, content, MODE)


def is_there(path: Path) -> bool:
    """Whether something is at a path, as far as this user may look."""
    try:
        return path.exists()
    except OSError:
        return False
