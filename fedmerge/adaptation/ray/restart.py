"""An actor that may die: what was asked of it is asked again, as soon as another has taken its place and knows what it knew."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from fedmerge.errors import TargetError

T = TypeVar("T")

GLANCE_S = 0.2
"""Between two looks at whether the next actor is there, seconds."""


class Died(TargetError):
    """The actor's process is gone. final: it will not be started again."""

    def __init__(self, said: str, final: bool) -> None:
        super().__init__(said)
        self.final = final

    def __reduce__(self) -> tuple[type[Died], tuple[str, bool]]:
        return type(self), (str(self), self.final)


@dataclass
class Revival:
    """Does work that may end in `Died`. most: deaths that are survived. revive: let the next actor know what the last one knew;
    raises Died while there is none. position: batches done. deaths: the position at each."""

    most: int
    deadline_s: float
    revive: Callable[[], None]
    position: Callable[[], int]
    deaths: list[int] = field(default_factory=list)

    def surely(self, work: Callable[[], T]) -> T:
        """The work's result, by this actor or by one of the next. Raises Died after too many deaths."""
        while True:
            try:
                return work()
            except Died as death:
                if len(self.deaths) >= self.most:
                    raise
                self.deaths.append(self.position())
                self._await_next(death)

    def _await_next(self, death: Died) -> None:
        began = time.monotonic()
        while time.monotonic() - began < self.deadline_s:
            try:
                return self.revive()
            except Died as still:
                death = still
                if still.final:
                    break
            time.sleep(GLANCE_S)
        raise death
