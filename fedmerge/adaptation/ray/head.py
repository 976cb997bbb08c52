"""Whether Ray's head is still there: without it nothing is started again, and Ray itself would end this process after a minute."""

from __future__ import annotations

import socket
import time

from fedmerge.errors import TargetError

KNOCKS = 3
"""Knocks in a row without an answer after which the head counts as lost."""

BETWEEN_S = 1.0
"""Between two knocks, seconds."""

KNOCK_S = 5.0
"""Longest wait for a head to take a connection, seconds."""


def knock(host: str, port: int) -> str:
    """Why nobody answers there, or nothing."""
    try:
        socket.create_connection((host.strip("[]"), port), KNOCK_S).close()
    except UnicodeError:
        return "no such name"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def see_to_head() -> None:
    """Raises TargetError if Ray's head does not answer, time and again."""
    import ray

    host, _, port = str(ray.get_runtime_context().gcs_address).rpartition(":")
    for _ in range(KNOCKS):
        if not (why := knock(host, int(port))):
            return
        time.sleep(BETWEEN_S)
    kept = "What is done is kept: give the same command with --resume once there is a cluster again, or without RAY_ADDRESS"
    raise TargetError(f"Ray's head at {host}:{port} is lost ({why}). {kept}")
