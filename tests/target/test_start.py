"""Ray that cannot start: tried again, then one message."""

from __future__ import annotations

import pytest

from fedmerge.errors import TargetError
from fedmerge.target import actor


class Slow:
    """Stands for the package: it starts at the given attempt, and complains before as Ray does on a busy machine."""

    def __init__(self, starts_at: int) -> None:
        self.starts_at, self.tried, self.stopped = starts_at, 0, 0

    def init(self, **_: object) -> None:
        self.tried += 1
        if self.tried < self.starts_at:
            raise Exception("The current node timed out during startup. This could happen because ...")

    def shutdown(self) -> None:
        self.stopped += 1


def test_a_start_that_takes_too_long_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    late = Slow(actor.START_ATTEMPTS)
    actor._start(late)
    assert (late.tried, late.stopped) == (actor.START_ATTEMPTS, actor.START_ATTEMPTS - 1)
    never = Slow(99)
    with pytest.raises(TargetError, match="Ray cannot be started or reached: The current node timed out"):
        actor._start(never)
    assert never.tried == actor.START_ATTEMPTS
