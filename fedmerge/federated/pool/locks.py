"""Processes that share a pool take turns: what another run is having trained is waited for, and not trained twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedmerge.system.process import free_lock

PAUSE_S = 0.2


@dataclass(frozen=True)
class Awaited:
    """What a pool is to hold: its name in messages, its folder in the pool, and whether it is there."""

    name: str
    entry: Path
    there: Callable[[], bool]


@contextmanager
def turns(pool: Path, awaited: Sequence[Awaited], deadline_s: float, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the turn for everything that is not in the pool, after whoever holds it now; `on_wait` is told what it is.

    In order of folders, so that no two processes wait for each other, and once for each, or a process would wait for itself:
    strategies that differ in their labels alone have one. After deadline_s it goes on without the turns that it could not get: the
    same is then trained twice, and one of the two is kept. A turn ends with its process, however that ends.
    """
    began = time.monotonic()
    with ExitStack() as held:
        folders = {one.entry.name: one for one in awaited if not one.there()}
        for _, one in sorted(folders.items()):
            file = pool / "turns" / f"{one.entry.name}.lock"
            file.parent.mkdir(parents=True, exist_ok=True)
            told = False
            while not one.there() and not _taken(file, held) and time.monotonic() - began < deadline_s:
                if not told:
                    on_wait(one.name)
                    told = True
                time.sleep(PAUSE_S)
        yield


def _taken(file: Path, held: ExitStack) -> bool:
    lock = free_lock(file)
    if lock is not None:
        held.callback(lock.release)
    return lock is not None
