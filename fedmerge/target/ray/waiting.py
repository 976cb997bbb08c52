"""Waiting for an actor: never without a deadline, and Ray's errors as ours."""

from __future__ import annotations

from typing import Any

from fedmerge.errors import FedmergeError, TargetError
from fedmerge.target.revival import Died

START_DEADLINE_S = 600.0
"""Longest wait for the actor to start and load its images, and for each expert, seconds; a busy machine takes minutes."""


def wait(reference: Any, what: str, deadline_s: float, who: str = "the target's actor", replaced: bool = False) -> Any:
    """What one call gave, or a list of them. who: whose call it is. replaced: whether another is made where it has died.

    Raises the user's error that it raised, TargetError if it failed or is late, and Died if its process is gone.
    """
    import ray

    try:
        return ray.get(reference, timeout=deadline_s)
    except ray.exceptions.GetTimeoutError:
        raise TargetError(f"waited {deadline_s:g} s for {what}; raise target_deadline_s, or give the target more") from None
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, FedmergeError):
            raise cause from None
        raise TargetError(f"the target failed: {type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayError as error:
        final = not replaced and not isinstance(error, ray.exceptions.ActorUnavailableError)
        raise Died(f"{who} is gone ({type(error).__name__}) while waiting for {what}", final) from None
