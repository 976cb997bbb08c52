"""Processes that do some work for another one."""

from __future__ import annotations

import operator
import os
from itertools import islice

import pytest

from fedmerge.system.process import free_memory, spread


def away(number: int) -> int:
    """Ends every process but the one that asks."""
    return number if os.getpid() == int(os.environ["ASKS"]) else os._exit(1)


@pytest.mark.parametrize("processes", [1, 2])
def test_answers_come_in_the_order_of_the_tasks(processes: int) -> None:
    assert list(spread(operator.neg, range(40), processes)) == [-number for number in range(40)]
    assert list(spread(operator.neg, [], processes)) == []


def test_tasks_are_taken_as_answers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def tasks() -> list[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    assert list(islice(spread(operator.neg, tasks(), 2), 2)) == [0, -1]
    assert len(taken) < 10


def test_an_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="bad operand"):
        list(spread(operator.neg, [1, "a", 2], 2))


def test_what_the_dead_leave_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASKS", str(os.getpid()))
    assert list(spread(away, range(6), 2)) == list(range(6))


def test_the_system_tells_what_memory_is_left() -> None:
    free = free_memory()
    assert free is None or free > 2**20
