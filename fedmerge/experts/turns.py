"""Processes that share a pool take turns: an expert that another run is having trained is waited for, and not trained twice."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO

from fedmerge.experts.pool import ExpertPool
from fedmerge.experts.train import SiteTask

PAUSE_S = 0.2


@contextmanager
def turns(pool: ExpertPool, tasks: Sequence[SiteTask], deadline_s: float, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the turn for every expert that is not in the pool, after whoever holds it now; `on_wait` is told whose it is.

    In order of names, so that no two processes wait for each other. After deadline_s it goes on without the turns that it could
    not get: the same expert is then trained twice, and one of the two is kept. A turn ends with its process, however that ends.
    """
    began = time.monotonic()
    with ExitStack() as held:
        for task in sorted((task for task in tasks if not pool.has(task)), key=lambda task: pool.entry(task).name):
            file = pool.path / "turns" / f"{pool.entry(task).name}.lock"
            file.parent.mkdir(parents=True, exist_ok=True)
            opened = held.enter_context(file.open("w"))
            told = False
            while not pool.has(task) and not _taken(opened) and time.monotonic() - began < deadline_s:
                if not told:
                    on_wait(task.site.name)
                    told = True
                time.sleep(PAUSE_S)
        yield


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
