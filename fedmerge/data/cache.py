"""Decoded or rendered pixels on their owner's disk: made once, and read from there as they are needed.

What is made row by row lies in one file, which is mapped into memory: the system reads what is looked at, and takes the room back
when it needs it. Such a file appears whole or not at all, and one process at a time makes it.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import mmap
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock
from numpy.typing import DTypeLike, NDArray
from platformdirs import user_cache_path

from fedmerge.errors import DataError, FolderError
from fedmerge.system.files import at_home, atomic, atomic_write, see_that_writable
from fedmerge.system.process import free_memory

Arrays = dict[str, NDArray[Any]]
Index = NDArray[np.int64]

SMALL = 2**26
"""Bytes up to which changed pixels are held in memory: to change them again takes no longer than to find them on disk."""

VALUES = 2**23
"""Numbers of images that are worked on at a time, which bounds their float copies."""

MOST_AT_A_TIME = 512

MOST_CHECKED = 2**30
"""Bytes of pixels up to which a checksum tells, before they are used, whether they are as they were written.

A third of a second for each GB in memory, where a run takes five to normalize its pixels once. More of them may have to come from
the disk first, also for those who look at few or none, as `plan` does.
"""

CHECKSUM = "crc32"
"""Its name among the arrays beside pixels; caches of older versions have none."""

log = logging.getLogger(__name__)


def folder() -> Path:
    """`FEDMERGE_CACHE`, else `fedmerge` in the user's cache folder."""
    given = os.environ.get("FEDMERGE_CACHE")
    return at_home(given) if given else user_cache_path("fedmerge", appauthor=False)


def unusable() -> list[str]:
    """Why the cache cannot be written, for readers of a run, or nothing."""
    try:
        see_that_writable(folder(), "cache of decoded images")
    except FolderError as error:
        return [f"{error}. Until then every process makes what is not there, and holds it in memory (FEDMERGE_CACHE names another)"]
    return []


def cached(owner: str, key: str, make: Callable[[], Arrays]) -> Arrays:
    """The named arrays that `make` returns, from the owner's cache if they are there and readable.

    A cache that cannot be read or written is no error: the arrays are made again.
    """
    file = folder() / owner / f"{key}.npz"
    if (stored := _read(file)) is not None:
        return stored
    arrays = make()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, _packed(arrays))
    return arrays


def cached_rows(owner: str, key: str, make: Callable[[Rows], Arrays]) -> Arrays:
    """`pixels`, mapped from the owner's cache, and the named arrays that `make` returns as it begins and fills their rows.

    Where the cache cannot be written or is full, all rows are held in memory, and that is said.
    Raises DataError if they do not go into that either.
    """
    place = folder() / owner
    if (stored := _stored(place, key)) is not None:
        return stored
    try:
        with _turn(place):
            stored = _stored(place, key)  # by whoever had the turn before
            return _kept(place, key, make) if stored is None else stored
    except _UnusableError as error:
        return _held(owner, make, error.why)


Change = Callable[[NDArray[Any], Index], NDArray[np.uint8]]
"""Some images (n, H, W, C) and their places (n,) -> how they look then."""


def changed(owner: str, key: str, pixels: NDArray[Any], change: Change) -> NDArray[np.uint8]:
    """Images (N, H, W, C) after `change`, which is given some at a time, in order, with their places.

    Few are held in memory. Many are kept on disk: under the key, or without one for as long as they are looked at.
    """

    def make(rows: Rows) -> Arrays:
        rows.begin(pixels.shape, np.uint8)
        for start, stop in parts(pixels.shape):
            rows.put(start, change(pixels[start:stop], np.arange(start, stop)))
            let_go(pixels)
        return {}

    if prod(pixels.shape) <= SMALL:
        return _filled(Rows(), make)["pixels"]
    if key:
        return cached_rows(owner, key, make)["pixels"]
    try:
        with _scratch() as file:
            return _filled(Rows(file), make)["pixels"]
    except _UnusableError as error:
        return _held(owner, make, error.why)["pixels"]


def key_of(*determined: Any) -> str:
    """A key: the sha256 of all that determines what is made."""
    return sha256(json.dumps(determined, sort_keys=True).encode()).hexdigest()


def parts(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First place and end of images that may be worked on together. shape: (N, ...) of all."""
    size = max(1, min(MOST_AT_A_TIME, VALUES // max(1, prod(shape[1:]))))
    for start in range(0, shape[0], size):
        yield start, min(start + size, shape[0])


def mapped_from(pixels: NDArray[Any]) -> mmap.mmap | None:
    """The file that an array is read from as it is looked at; None for one that is in memory."""
    base: Any = pixels
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    return base


def let_go(pixels: NDArray[Any]) -> None:
    """Take what was looked at of a file out of this process: otherwise its pages count as the process's until memory is short."""
    file = mapped_from(pixels)
    if file is not None and hasattr(mmap, "MADV_DONTNEED"):
        file.madvise(mmap.MADV_DONTNEED)


class Rows:
    """An array (N, ...) while its rows are made: in a file, or without one in memory.

    admit: called with the bytes that all rows take, before they are made in memory.
    """

    def __init__(self, file: IO[bytes] | None = None, admit: Callable[[int], None] | None = None) -> None:
        self._file, self._admit = file, admit

    def begin(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        """Make room for rows of an array (N, ...)."""
        self._shape, self._dtype = shape, np.dtype(dtype)
        self._bytes = prod(shape[1:]) * self._dtype.itemsize
        if self._file is None:
            if self._admit is not None:
                self._admit(shape[0] * self._bytes)
            self._array = np.empty(shape, dtype)
            return
        with _as_unusable():
            self._write_header()
            self._start = self._file.tell()
            _reserve(self._file, self._start + shape[0] * self._bytes)

    def put(self, start: int, rows: NDArray[Any]) -> None:
        """Rows (n, ...) from `start` on."""
        if self._file is None:
            self._array[start : start + len(rows)] = rows
            return
        with _as_unusable():
            self._file.seek(self._start + start * self._bytes)
            left = np.ascontiguousarray(rows, self._dtype).reshape(-1).view(np.uint8).data
            while left:  # the last bytes that go onto a full disk are written, and the next ones refused
                left = left[self._file.write(left) :]

    def keep(self, chosen: Index) -> None:
        """Leave the rows at these places (n,), which rise, and no others."""
        to = 0
        for run in np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1):
            for start, stop in parts((len(run), *self._shape[1:])) if len(run) and run[0] != to else ():
                self.put(to + start, self._read(int(run[0]) + start, stop - start))
            to += len(run)
        self._shape = (len(chosen), *self._shape[1:])

    def done(self) -> NDArray[Any]:
        """The whole array; one in a file is mapped."""
        if self._file is None:
            return self._array[: self._shape[0]]
        with _as_unusable():
            self._file.seek(0)
            self._write_header()  # numpy leaves room in it for another number of rows
            self._file.truncate(self._start + self._shape[0] * self._bytes)
            self._file.flush()
            os.fsync(self._file.fileno())  # or a file that has its name might be empty after the power has failed
            return np.memmap(self._file, self._dtype, "r", self._start, self._shape)

    def _write_header(self) -> None:
        assert self._file is not None
        fields = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(self._file, fields)

    def _read(self, start: int, count: int) -> NDArray[Any]:
        shape = (count, *self._shape[1:])
        if self._file is None:
            return self._array[start : start + count].copy()
        with _as_unusable():
            self._file.seek(self._start + start * self._bytes)
            return np.frombuffer(self._file.read(count * self._bytes), self._dtype).reshape(shape)


class _UnusableError(Exception):
    """The cache cannot be written. why: in the system's words."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.why = getattr(error, "strerror", None) or str(error)


@contextmanager
def _as_unusable() -> Iterator[None]:
    """An error of the cache's own disk is told from one of the disk that images come from."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        raise _UnusableError(error) from error


@contextmanager
def _scratch() -> Iterator[IO[bytes]]:
    """A file without a name, which is gone when nobody looks at it any more."""
    with _as_unusable():
        folder().mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder(), buffering=0)  # noqa: SIM115 - open for whoever has it
    with file:
        yield file


@contextmanager
def _turn(place: Path) -> Iterator[None]:
    """One process at a time makes something for an owner. The turn ends with its process, however that ends."""
    with ExitStack() as held:
        with _as_unusable():
            place.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(place / "making.lock"))
            for draft in place.glob(".*.npy-*.draft"):  # of a process that was killed, or it would have the turn
                draft.unlink(missing_ok=True)
        yield


def _kept(place: Path, key: str, make: Callable[[Rows], Arrays]) -> Arrays:
    """Into the cache: first the rows, then the arrays beside them, which say that the rows are whole."""
    with ExitStack() as opened:
        with _as_unusable():
            file = opened.enter_context(opened.enter_context(atomic(place / f"{key}.npy")).open("w+b", buffering=0))
        found = _filled(Rows(file), make)
        with _as_unusable():
            opened.close()
            facts = {name: array for name, array in found.items() if name != "pixels"}
            atomic_write(place / f"{key}.npz", _packed({**facts, CHECKSUM: np.array(_checksum(found["pixels"]))}))
    return found


def _checksum(pixels: NDArray[Any]) -> int:
    """CRC-32 of an array's bytes, and -1 for one that is too large."""
    if pixels.nbytes > MOST_CHECKED:
        return -1
    found = 0
    for start, stop in parts(pixels.shape):
        found = zlib.crc32(np.ascontiguousarray(pixels[start:stop]).data, found)
        let_go(pixels)
    return found


def _stored(place: Path, key: str) -> Arrays | None:
    """What the cache holds, if it is whole."""
    facts = _read(place / f"{key}.npz")
    if facts is None:
        return None
    written = facts.pop(CHECKSUM, None)
    try:
        pixels = np.load(place / f"{key}.npy", mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    if written is not None and int(written) != _checksum(pixels):
        log.warning("site '%s': %s: found other pixels than were written; they are made again", place.name, place / f"{key}.npy")
        return None
    return {**facts, "pixels": pixels}


def _held(owner: str, make: Callable[[Rows], Arrays], why: str) -> Arrays:
    """In memory, for want of a cache."""
    return _filled(Rows(admit=lambda needed: _admit(owner, needed, why)), make)


def _admit(owner: str, needed: int, why: str) -> None:
    """Say that so many bytes are held in memory, or raise DataError if they do not go into it."""
    free, mend = free_memory(), "Make room there, or set FEDMERGE_CACHE to a folder that can hold them"
    if free is not None and needed > free // 2:
        told = f"its images take {_size(needed)}, and the cache folder cannot hold them ({why}); expected room for them. {mend}"
        raise DataError(
            f"site '{owner}': cache folder '{folder()}': found {why}; expected room for {_size(needed)} of images, which do not go "
            f"into the memory either ({_size(free)} free). {mend}",
            told,
        )
    log.warning(
        "site '%s': cache folder '%s' cannot be used (%s): %s of images are made anew by every process, and held in memory. %s",
        *(owner, folder(), why, _size(needed), mend),
    )


def _filled(rows: Rows, make: Callable[[Rows], Arrays]) -> Arrays:
    facts = make(rows)
    return {**facts, "pixels": rows.done()}


def _read(file: Path) -> Arrays | None:
    try:
        with np.load(file) as stored:
            return dict(stored)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _packed(arrays: Arrays) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type] # the stub takes them for options
    return content.getvalue()


def _reserve(file: IO[bytes], size: int) -> None:
    """Room for the whole file, so that a full disk is known before the work and not after it. Raises OSError."""
    if size > shutil.disk_usage(folder()).free:  # asking a file system for more would fill it before it refuses
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
