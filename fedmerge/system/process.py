"""Child processes that end when their parent does, however that ends: a kill -9 leaves nobody to tell them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

STDIN = 0


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """End this process group as soon as standard input, a pipe that only the parent holds open, is closed.

    For a process that leads a group of its own: what it has started ends with it.
    """

    def wait() -> None:
        while os.read(STDIN, 1):  # not through sys.stdin, whose lock a thread must not hold when the interpreter ends
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def owners(
    count: int, begin: Callable[..., None] | None = None, arguments: tuple[Any, ...] = (), tasks_each: int | None = None
) -> ProcessPoolExecutor:
    """Processes that own images for a while; each first calls `begin`. The pool's own would wait for ever for a killed parent."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, _begin, (begin, arguments), max_tasks_per_child=tasks_each)


def _begin(begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_follow, name="lifeline", daemon=True).start()
    if begin is not None:
        begin(*arguments)


def _follow() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
