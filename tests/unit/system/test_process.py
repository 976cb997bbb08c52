"""Processes that do some work for another one."""

from __future__ import annotations

import operator
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from multiprocessing import forkserver
from pathlib import Path

import pytest

from fedmerge.system.process import (
    cores,
    free_memory,
    one_thread,
    owners,
    process_context,
    spread,
    threads,
    wait_briefly,
)


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


@pytest.mark.parametrize(
    ("given", "expected"), [("3", 3), ("4,2", 4), (" 2 ", 2), ("", cores()), ("0", cores()), ("-1", cores()), ("many", cores())]
)
def test_threads_are_those_that_the_environment_asks_for(given: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of any program that runs OpenMP, and PyTorch by itself: a list is for loops within loops, and its first number counts."""
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert threads() == expected


def test_one_thread_is_for_a_while() -> None:
    import torch  # not above: this module is imported by processes, too, and torch takes a second

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_owners_have_the_environment_and_the_folder_of_the_moment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whenever the server that they are forked from began, and whatever an earlier one has changed for itself."""
    for number in ("1", "2"):
        monkeypatch.setenv("ASKS", number)
        monkeypatch.chdir(tmp_path)
        with owners(1) as owner:
            assert owner.submit(os.getenv, "ASKS").result() == number
            assert owner.submit(os.getcwd).result() == str(tmp_path)
            assert owner.submit(os.getpid).result() != os.getpid()
            owner.submit(os.putenv, "ASKS", "another").result()
    monkeypatch.delenv("ASKS")
    with owners(1) as owner:
        assert owner.submit(os.getenv, "ASKS").result() is None


def test_owners_do_not_run_the_script_that_asks(tmp_path: Path) -> None:
    """It needs no `if __name__ == "__main__":`, and is `__main__` as before when it goes on."""
    script = tmp_path / "script.py"
    asking = [
        "import os, sys",
        "from fedmerge.system.process import owners",
        "print(__name__)",
        "program = sys.modules['__main__']",
        "with owners(1) as owner:",
        "    print(owner.submit(os.getcwd).result())",
        "print(sys.modules['__main__'] is program)",
    ]
    script.write_text("\n".join(asking), encoding="utf-8")
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout.splitlines()) == (0, ["__main__", str(Path.cwd()), "True"]), ran.stderr


def test_owners_end_with_who_started_them() -> None:
    """However that ends; so does what they were forked from."""
    asking = [
        "import os, time",
        "from fedmerge.system.process import owners",
        "owner = owners(1)",
        "print(owner.submit(os.getpid).result(), flush=True)",
        "time.sleep(60)",
    ]
    asked = subprocess.Popen([sys.executable, "-c", "\n".join(asking)], stdout=subprocess.PIPE, text=True)
    assert asked.stdout
    owner = int(asked.stdout.readline())
    server = int(Path(f"/proc/{owner}/stat").read_text().rpartition(")")[2].split()[1]) if Path("/proc").is_dir() else asked.pid
    asked.kill()
    asked.wait()
    for number in {owner, server}:
        while running(number):
            time.sleep(0.05)


def running(number: int) -> bool:
    """Whether there is such a process. One that nobody waits for in this container counts as ended."""
    try:
        os.kill(number, 0)
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)], ids=str
)
def test_threads_wait_briefly_unless_somebody_has_said_how(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    wait_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_commands_wait_briefly_before_torch_is_there() -> None:
    """GNU's OpenMP reads it once, as it is loaded."""
    said = "import sys; sys.argv = ['fedmerge', '--help']; from fedmerge.{} import {} as run"
    at_the_end = "import atexit, os; atexit.register(lambda: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)); run()"
    here = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for module, name in [("__main__", "command"), ("simulate", "command_alone")]:
        code = f"{said.format(module, name)}; {at_the_end}"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=here, timeout=120)
        assert ended.stdout.splitlines()[-1] == "1000 False"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every process imports for itself")
def test_ctrl_c_does_not_reach_what_processes_are_forked_from() -> None:
    """From its very beginning, when it imports; the processes themselves hear it."""
    process_context()
    server = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/status").read_text()  # type: ignore[attr-defined]
    (blocked,) = (line for line in server.splitlines() if line.startswith("SigBlk"))
    assert int(blocked.split()[1], 16) >> (signal.SIGINT - 1) & 1
    with owners(1) as executor:
        assert executor.submit(signal.pthread_sigmask, signal.SIG_BLOCK, []).result(60) == set()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
