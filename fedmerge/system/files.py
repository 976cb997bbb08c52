"""Files and folders that appear whole or not at all, and files that only their owner may read."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from fedmerge.errors import FedmergeError, FolderError, first_line

SECRET = 0o600
FOR_ALL = 0o666
"""Modes of files, of which the umask takes its share."""


def at_home(path: str | Path) -> Path:
    """A path with ~ and environment variables filled in; what this machine does not know of them stays, as in a shell."""
    filled = Path(os.path.expandvars(path))
    try:
        return filled.expanduser()
    except RuntimeError:  # ~name, of whom there is no home
        return filled


def file_digest(file: Path) -> str:
    """A sha256 of the file's bytes, or nothing if it cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except (OSError, ValueError):
        return ""


SETTLED_NS = 2_000_000_000
"""Age of the last change from which on a file's times tell of the next one: file systems count in steps of up to two seconds."""


def settled_digest(file: Path) -> str:
    """The same, of a large file that is asked for often: its bytes are read once, for as long as it stays as it is."""
    try:
        facts = file.stat()
    except (OSError, ValueError):  # a NUL in its name
        return ""
    if facts.st_ctime_ns + SETTLED_NS > time.time_ns():
        return file_digest(file)
    return _digest_once(file, (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))


@lru_cache(maxsize=256)
def _digest_once(file: Path, facts: tuple[int, ...]) -> str:
    return file_digest(file)


@contextmanager
def atomic(file: Path, mode: int = FOR_ALL) -> Iterator[Path]:
    """A draft beside `file`, which takes its place when the block ends, and is removed if anything fails.

    mode: of the draft from its first byte on, less what the umask takes; a library that writes it anew does not change it. No two
    drafts have the same name, so that threads and processes may write the same file: one of them wins. A device or a pipe is
    written as it is, and a link stays one: what it leads to is written. An OSError names `file`.
    """
    if _is_device(file):
        with naming(file, file):
            yield file
        return
    if file.is_symlink():
        file = Path(os.path.realpath(file))
    draft = _draft_of(file)
    try:
        with naming(file, draft):
            draft.touch(mode, exist_ok=False)
            allowed = stat.S_IMODE(draft.stat().st_mode)
            yield draft
            draft.chmod(allowed)
            draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def atomic_write(file: Path, content: str | bytes, mode: int = FOR_ALL) -> None:
    """Write `content` to `file`, text as UTF-8 with the line ends it has; mode: of a file that is not for all. Raises OSError."""
    with atomic(file, mode) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A draft beside `folder`, which becomes it when the block ends; where another process was first, its folder stays.

    Whoever may read the folder, as the umask has it, may read the files in it: safetensors writes them for their owner alone.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft_of(folder)
    try:
        with naming(folder, draft):
            draft.mkdir()
            yield draft
            allowed = stat.S_IMODE(draft.stat().st_mode) & FOR_ALL
            for file in draft.iterdir():
                file.chmod(allowed)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def see_that_writable(folder: Path, name: str) -> None:
    """Make a folder, if it is not there, and see that files can be written into it, before anything is computed for them.

    Raises FolderError that calls it `name`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        found, mend = f"'{folder}', which cannot be written ({error.strerror})", "Choose another, or change its rights"
        raise FolderError(f"{name}: found {found}; expected a folder that this user may write. {mend}") from None


def see_that_file_writable(file: Path, name: str, example: str) -> None:
    """The same of the folder of a file that a user names. Raises FolderError, which gives an `example` in place of a folder."""
    if file.is_dir():
        raise FolderError(f"{name}: found the folder '{file}'; expected a file, e.g. {file / example}")
    if not _is_device(file):
        see_that_writable(file.parent, name)


@contextmanager
def reading(place: Path, found: str, expected: str) -> Iterator[None]:
    """Where a file of fedmerge's own is read, and nothing else is done: what breaks there is the file, however it was damaged.

    Raises FolderError: `PLACE: found FOUND (why); EXPECTED`.
    """
    try:
        yield
    except FedmergeError:
        raise
    except Exception as error:  # whatever a torn file, or one of another program, breaks in there
        raise FolderError(f"{place}: found {found} ({_why(error)}); {expected}") from None


def _why(error: Exception) -> str:
    """What is wrong with content that was read."""
    if isinstance(error, KeyError):
        return f"without {error}"
    if isinstance(error, TypeError | AttributeError | IndexError):
        return "not in the form that fedmerge writes"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return first_line(error)


def _is_device(file: Path) -> bool:
    """Whether it is something like /dev/stdout, whose place no file may take."""
    return file.exists() and not (file.is_file() or file.is_dir())


@contextmanager
def naming(place: Path, draft: Path) -> Iterator[None]:
    """An OSError names a place that users know: of its own it names the draft, or nothing where a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(error.filename or place).replace(str(draft), str(place))
        raise


def _draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}.draft")


def write_secret(file: Path, content: bytes) -> None:
    """Write `content` to `file`, whole or not at all, readable by its owner alone from the first byte on. Raises OSError."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    atomic_write(file, content, SECRET)


def is_there(path: Path) -> bool:
    """Whether something is at a path, as far as this user may look."""
    try:
        return path.exists()
    except OSError:
        return False
