"""Turns at training an expert: one process at a time, and nobody waits for ever."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedmerge.federated.messages import SiteTask
from fedmerge.federated.pool.experts import ExpertPool
from fedmerge.federated.pool.locks import Awaited, turns
from fedmerge.system.process import free_lock

Hospitals = Callable[..., SiteTask]


def awaited(pool: ExpertPool, *tasks: SiteTask) -> list[Awaited]:
    return [Awaited(task.site.name, pool.entry(task), partial(pool.has, task)) for task in tasks]


def test_a_turn_is_waited_for_and_no_longer_than_asked(tmp_path: Path, hospital: Hospitals) -> None:
    pool, tasks = ExpertPool(tmp_path), [hospital("north"), hospital("south")]
    waited: list[str] = []
    with turns(tmp_path, awaited(pool, *tasks), 5, waited.append):
        assert waited == []
        began = time.monotonic()
        with turns(tmp_path, awaited(pool, tasks[0]), 0.5, waited.append):
            assert time.monotonic() - began >= 0.5
    assert waited == ["north"]
    with turns(tmp_path, awaited(pool, *tasks), 0, waited.append):
        assert waited == ["north"]


def test_nobody_waits_for_himself(tmp_path: Path, hospital: Hospitals) -> None:
    pool, task = ExpertPool(tmp_path), hospital("north")
    waited: list[str] = []
    with turns(tmp_path, awaited(pool, task, task), 60, waited.append):
        assert waited == []


def test_who_waits_goes_on_when_the_expert_is_there(tmp_path: Path, hospital: Hospitals) -> None:
    pool, task = ExpertPool(tmp_path), hospital("north")
    entered, waiting = threading.Event(), threading.Event()

    def other() -> None:
        with turns(tmp_path, awaited(pool, task), 60, lambda _: waiting.set()):
            entered.set()

    with turns(tmp_path, awaited(pool, task), 60, lambda _: None):
        second = threading.Thread(target=other)
        second.start()
        assert waiting.wait(10)
        assert not entered.wait(0.5)
        pool.entry(task).mkdir(parents=True)
        (pool.entry(task) / "manifest.json").write_text("{}")
        assert entered.wait(10)
    second.join(10)


HOLD = """
import sys, time
from pathlib import Path
from fedmerge.system.process import free_lock
lock = free_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    file = tmp_path / "north.lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert free_lock(file) is None
        child.kill()
    lock = free_lock(file)
    assert lock is not None
    lock.release()
