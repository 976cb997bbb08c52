"""Waiting for an actor: never without a deadline, and Ray's errors as ours. Nor for a cluster whose head is gone: without it
nothing is started again, and Ray itself would end this process after a minute."""

from __future__ import annotations

import socket
import time
from typing import Any

from fedmerge.adaptation.ray.restart import Died
from fedmerge.errors import FedmergeError, TargetError

START_DEADLINE_S = 600.0
"""Longest wait for the actor to start and load its images, and for each expert, seconds; a busy machine takes minutes."""

PULSE_S = 5.0
"""How often a wait looks whether Ray's head is still there, seconds."""


def wait(reference: Any, what: str, deadline_s: float, who: str = "the target's actor", replaced: bool = False) -> Any:
    """What one call gave, or a list of them. who: whose call it is. replaced: whether another is made where it has died.

    Raises the user's error that it raised, TargetError if it failed or is late or Ray's head is lost, and Died if its process is
    gone.
    """
    import ray

    ends = time.monotonic() + deadline_s
    while True:
        try:
            return ray.get(reference, timeout=max(0.0, min(PULSE_S, ends - time.monotonic())))
        except ray.exceptions.GetTimeoutError:
            if time.monotonic() >= ends:
                late = f"waited {deadline_s:g} s for {what}; raise target_deadline_s, or give the target more"
                raise TargetError(late) from None
            see_to_head()
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, FedmergeError):
                raise cause from None
            raise TargetError(f"the target failed: {type(cause).__name__}: {cause}") from error
        except ray.exceptions.RayError as error:
            see_to_head()
            final = not replaced and not isinstance(error, ray.exceptions.ActorUnavailableError)
            raise Died(f"{who} is gone ({type(error).__name__}) while waiting for {what}", final) from None


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
