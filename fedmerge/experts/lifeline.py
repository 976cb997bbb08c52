"""A child process that ends when its parent does, however that ends: a kill -9 leaves nobody to tell it."""

from __future__ import annotations

import os
import signal
import threading

STDIN = 0


def end_with_parent() -> None:
    """End this process group as soon as standard input, a pipe that only the parent holds open, is closed.

    For a process that leads a group of its own: what it has started ends with it.
    """

    def wait() -> None:
        while os.read(STDIN, 1):  # not through sys.stdin, whose lock a thread must not hold when the interpreter ends
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
