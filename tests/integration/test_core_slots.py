"""Runs of several processes share the cores of their machine, and one that dies leaves its core to the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.federated.flower.simulation import ACTIVE_PER_CORE, cpus_each
from fedmerge.system.process import core_slot, make_core_slots

RUNS = (
    "import sys, time; from pathlib import Path; from fedmerge.system.process import core_slot\n"
    "for number in range(int(sys.argv[2])):\n"
    "    with core_slot():\n"
    "        with Path(sys.argv[1]).open('a') as log: log.write(f'{time.time()} {number} in\\n')\n"
    "        time.sleep(float(sys.argv[3]))\n"
    "        with Path(sys.argv[1]).open('a') as log: log.write(f'{time.time()} {number} out\\n')\n"
)


def runs(log: Path, environment: dict[str, str], count: int, seconds: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", RUNS, str(log), str(count), str(seconds)]
    return subprocess.Popen(command, env={**os.environ, **environment})


def test_three_hospitals_keep_two_cores_busy_to_the_end(tmp_path: Path) -> None:
    """Five runs each of 0.2 s: two cores need 8 times that; whoever takes all of the first two before the third needs 10."""
    environment = make_core_slots(tmp_path / "slots", 2)
    logs = [tmp_path / f"{name}.log" for name in "abc"]
    for process in [runs(log, environment, 5, 0.2) for log in logs]:
        assert process.wait(60) == 0
    events = sorted(tuple(line.split()) for log in logs for line in log.read_text().splitlines())
    active, most = 0, 0
    for _, _, what in events:
        active += 1 if what == "in" else -1
        most = max(most, active)
    assert most == 2
    ends = [float(log.read_text().splitlines()[-1].split()[0]) for log in logs]
    assert max(ends) - min(ends) < 4 * 0.2  # nobody is left with runs of its own when the others are done


def test_a_slot_of_a_process_that_was_killed_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = make_core_slots(tmp_path / "slots", 1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    holder = runs(tmp_path / "log", environment, 1, 300)
    while not (tmp_path / "log").exists():
        time.sleep(0.02)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    began = time.monotonic()
    with core_slot():
        assert time.monotonic() - began < 5


def test_without_a_federation_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDMERGE_CORE_SLOTS", raising=False)
    began = time.monotonic()
    with core_slot(), core_slot():
        assert time.monotonic() - began < 5


@given(st.integers(1, 300), st.integers(1, 128))
def test_what_hospitals_hold_fits_into_the_cores(hospitals: int, count: int) -> None:
    """Otherwise one of Ray's clients waits for ever: Flower starts as many as all cores of a node can hold."""
    each = cpus_each(hospitals, count)
    started = int(count / each)
    assert round(started * each, 4) <= count
    assert started >= min(hospitals, ACTIVE_PER_CORE * count)
