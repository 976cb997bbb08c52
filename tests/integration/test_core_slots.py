"""Runs of several processes share the cores of their machine, and one that dies leaves its core to the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.federated.flower.simulation import ACTIVE_PER_CORE, cpus_each
from fedmerge.system.process import core_slot, free_lock, make_core_slots

RUNS = (
    "import sys, time; from pathlib import Path; from fedmerge.system.process import core_slot\n"
    "Path(sys.argv[1]).touch()\n"
    "for number in range(int(sys.argv[2])):\n"
    "    with Path(sys.argv[1]).open('a') as log: log.write(f'{time.time()} {number} asks\\n')\n"
    "    with core_slot():\n"
    "        with Path(sys.argv[1]).open('a') as log: log.write(f'{time.time()} {number} in\\n')\n"
    "        time.sleep(float(sys.argv[3]))\n"
    "        with Path(sys.argv[1]).open('a') as log: log.write(f'{time.time()} {number} out\\n')\n"
)


def runs(log: Path, environment: dict[str, str], count: int, seconds: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", RUNS, str(log), str(count), str(seconds)]
    return subprocess.Popen(command, env={**os.environ, **environment})


def test_three_hospitals_keep_two_cores_busy_to_the_end(tmp_path: Path) -> None:
    """Five runs each, all begun together: while one waits, nobody takes slot after slot, so nobody is left alone at the end."""
    environment = make_core_slots(tmp_path / "slots", 2)
    logs = [tmp_path / f"{name}.log" for name in "abc"]
    with FileLock(tmp_path / "slots" / "queue"):
        processes = [runs(log, environment, 5, 0.4) for log in logs]
        while not all(log.exists() for log in logs):
            time.sleep(0.02)
        time.sleep(5)  # from the touch to the queue, on a busy machine too
    for process in processes:
        assert process.wait(60) == 0
    events = sorted((float(at), what, log.name) for log in logs for at, _, what in map(str.split, log.read_text().splitlines()))
    active, most = 0, 0
    for _, what, _ in events:
        active += {"asks": 0, "in": 1, "out": -1}[what]
        most = max(most, active)
    assert most == 2
    asked: dict[str, int] = {}
    for place, (_, what, name) in enumerate(events):
        if what == "asks":
            asked[name] = place
        elif what == "in":
            passed = Counter(other for _, begun, other in events[asked[name] : place] if begun == "in")
            assert max(passed.values(), default=0) <= 2, (name, passed)  # without a queue all five: who gives back takes again


def test_a_slot_of_a_process_that_was_killed_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = make_core_slots(tmp_path / "slots", 1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    holder = runs(tmp_path / "log", environment, 1, 300)
    while not (tmp_path / "log").exists() or " in" not in (tmp_path / "log").read_text():
        time.sleep(0.02)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with core_slot():  # waits for ever otherwise
        assert free_lock(tmp_path / "slots" / "0.slot") is None


def test_without_a_federation_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDMERGE_CORE_SLOTS", raising=False)
    began: list[int] = []
    for number in range(2):
        with core_slot(), core_slot():  # the second waits for ever otherwise
            began.append(number)
    assert began == [0, 1]


@given(st.integers(1, 300), st.integers(1, 128))
def test_what_hospitals_hold_fits_into_the_cores(hospitals: int, count: int) -> None:
    """Otherwise one of Ray's clients waits for ever: Flower starts as many as all cores of a node can hold."""
    each = cpus_each(hospitals, count)
    started = int(count / each)
    assert round(started * each, 4) <= count
    assert started >= min(hospitals, ACTIVE_PER_CORE * count)
    assert started < 2 * hospitals  # and each is a process with a model of its own
