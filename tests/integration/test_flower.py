"""Real Flower and Ray: the federation gives what the plain loop gives, and one site's trouble costs no other its expert."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from fedmerge.federated.client.site_log import own_log
from fedmerge.federated.flower.launcher import SimulationBackend
from fedmerge.federated.messages import Job, SiteTask, Tick
from fedmerge.federated.pool.experts import ExpertPool
from fedmerge.federated.pool.statistics import StatisticPool
from fedmerge.federated.server.in_process import LocalBackend
from fedmerge.federated.statistics._base import STATISTICS

Hospital = Callable[..., SiteTask]
Jobs = Callable[..., Job]


def ray_processes() -> set[str]:
    """Ray's daemons that tests of this process have started: others may run beside them."""
    ours = f"FEDMERGE_CACHE={os.environ['FEDMERGE_CACHE']}".encode()
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    daemons = {line.split()[0] for line in found.splitlines() if "raylet" in line or "gcs_server" in line}
    return {pid for pid in daemons if ours in _environment(pid)}


def _environment(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def all_ended(before: set[str], within_s: float = 15) -> bool:
    """Ray's daemons notice that their owner is gone within seconds."""
    began = time.monotonic()
    while ray_processes() - before and time.monotonic() - began < within_s:
        time.sleep(0.2)
    return not ray_processes() - before


@pytest.mark.slow
def test_flower_gives_the_same_experts_as_the_plain_loop(hospital: Hospital, job: Jobs) -> None:
    before = ray_processes()
    tasks = (hospital("north", samples=3), hospital("south"))
    here, there = job(*tasks, folder="local"), job(*tasks, folder="flower")
    ticks: list[Tick] = []
    LocalBackend().gather(here, lambda _: None)
    outcomes = SimulationBackend().gather(there, ticks.append)
    assert {name: outcome.trained for name, outcome in outcomes.items()} == {"north": True, "south": True}
    for task in tasks:
        a, b = ExpertPool(here.pool).load(task), ExpertPool(there.pool).load(task)
        assert (a.sha256, a.runs, a.temperature, a.n) == (b.sha256, b.runs, b.temperature, b.n)
    assert {tick.site for tick in ticks} == {"north", "south"}
    assert all_ended(before)
    audits = [[json.loads(line) for line in j.audit.read_text().splitlines()] for j in (here, there)]
    strip = [sorted((x["site"], x["item"], x["bytes"], x["sha256"]) for x in lines) for lines in audits]
    assert strip[0] == strip[1]
    again = SimulationBackend().gather(there, ticks.append)
    assert not any(outcome.trained or outcome.reason for outcome in again.values())


@pytest.mark.slow
def test_a_site_that_fails_or_never_answers_is_named_and_costs_the_others_nothing(
    hospital: Hospital, job: Jobs, folder_of_text: dict[str, object]
) -> None:
    """The one that never answers is held up as soon as the quick one has: else it would take a core until the deadline."""
    before, stopped = ray_processes(), list[int]()
    quick, endless = hospital("quick"), hospital("endless", epochs=100_000, max_steps=10_000_000)
    bad = hospital("bad", folder_of_text)
    asked = job(quick, bad, endless, deadline_s=90)

    def on_tick(tick: Tick) -> None:
        if tick.site == "endless" and not stopped and ExpertPool(asked.pool).has(quick):
            stopped.extend(pid for pid in below(os.getpid()) if trains(pid))
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)

    try:
        outcomes = SimulationBackend().gather(asked, on_tick)
    finally:
        for pid in stopped:  # held up, it does not notice that Ray has ended, unless Ray has killed it
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert len(stopped) == 1
    assert outcomes["quick"].trained
    assert outcomes["bad"].reason.startswith("source.max_broken: found more than 2 files that are no image")
    assert "liver" not in outcomes["bad"].reason
    assert "ward/liver/0.png" in own_log("bad").read_text()
    assert "Traceback" not in outcomes["bad"].reason
    assert not ExpertPool(asked.pool).has(bad)
    assert "did not answer within 90 s" in outcomes["endless"].reason
    assert ExpertPool(asked.pool).has(quick)
    assert all_ended(before)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_linear_probing_by_flower_is_that_of_the_plain_loop(hospital: Hospital, job: Jobs) -> None:
    tasks = (hospital("north"), hospital("south"))
    here, there = (
        LocalBackend().probe(job(*tasks, folder="local"), lambda _: None),
        SimulationBackend().probe(job(*tasks), lambda _: None),
    )
    assert here.sha256 == there.sha256 != job(*tasks).initial.sha256


def below(pid: int) -> dict[int, str]:
    """Processes that a process has started, and those that they have."""
    table = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    rows = [(int(a), int(b), c) for a, b, c in (line.split(None, 2) for line in table)]
    own = {child: args for child, parent, args in rows if parent == pid}
    return own | {key: value for child in own for key, value in below(child).items()}


def trains(pid: int) -> bool:
    """Whether a process holds one of the slots for cores."""
    try:
        return any(file.readlink().suffix == ".slot" for file in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_client_that_dies_is_asked_again(hospital: Hospital, job: Jobs) -> None:
    """Killed at its first sign of life: it begins again, and trains the expert that it would have trained."""
    task, killed = hospital("north", epochs=100), list[int]()

    def on_tick(tick: Tick) -> None:
        for pid, args in below(os.getpid()).items() if not killed else ():
            if args.startswith("ray::ClientAppActor"):
                with suppress(ProcessLookupError):  # it may have ended by itself since the list was made
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    here, there = job(task, folder="local"), job(task, folder="flower", deadline_s=240)
    outcome = SimulationBackend().gather(there, on_tick)["north"]
    assert (outcome.trained, outcome.reason, outcome.tries) == (True, "", 2)
    assert killed
    LocalBackend().gather(here, lambda _: None)
    assert ExpertPool(there.pool).load(task).sha256 == ExpertPool(here.pool).load(task).sha256


def test_statistics_come_from_as_many_sites_as_are_enough(hospital: Hospital, job: Jobs, folder_of_text: dict[str, object]) -> None:
    uploads = (STATISTICS.load("fisher")(samples=4),)
    good, bad = (task.model_copy(update={"uploads": uploads}) for task in (hospital("good"), hospital("bad", folder_of_text)))
    enough = replace(job(good, bad), at_least=1)
    outcomes = LocalBackend().gather(enough, lambda _: None)
    assert (outcomes["good"].reason, "files that are no image" in outcomes["bad"].reason) == ("", True)
    pool = ExpertPool(enough.pool)
    assert set(StatisticPool(pool, (good,)).with_statistics(pool.load(good), good).statistics) == {"fisher"}


def test_a_process_that_owns_images_ends_with_who_started_it(tmp_path: Path) -> None:
    """It waits for its next task when its parent is killed."""
    told = tmp_path / "pid"
    parent = (
        "import os, sys, time; from pathlib import Path; from fedmerge.system.process import owners\n"
        "if __name__ == '__main__':\n"
        "    owner = owners(1); Path(sys.argv[1]).write_text(str(owner.submit(os.getpid).result())); time.sleep(300)\n"
    )
    file = tmp_path / "parent.py"
    file.write_text(parent)
    with subprocess.Popen([sys.executable, str(file), str(told)]) as driver:
        while not (told.exists() and told.read_text()):
            time.sleep(0.02)
        driver.kill()
    began = time.monotonic()
    while alive(int(told.read_text())) and time.monotonic() - began < 30:
        time.sleep(0.05)
    assert not alive(int(told.read_text()))


def test_a_federation_ends_with_who_started_it(tmp_path: Path) -> None:
    """A parent killed with SIGKILL tells nobody; its child's group ends all the same, and what the child has started with it."""
    child = (
        "import subprocess, sys, time; from pathlib import Path; from fedmerge.system.process import end_with_parent;"
        "end_with_parent(); below = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']);"
        "Path(sys.argv[1]).write_text(str(below.pid)); time.sleep(300)"
    )
    own_group = "stdin=subprocess.PIPE, start_new_session=True"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]], {own_group}).wait()"
    told = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", parent, "-c", child, str(told)]) as driver:
        while not (told.exists() and told.read_text()):
            time.sleep(0.02)
        started = below(driver.pid)
        assert int(told.read_text()) in started
        driver.kill()
    began = time.monotonic()
    while any(alive(pid) for pid in started) and time.monotonic() - began < 30:
        time.sleep(0.05)
    assert not [pid for pid in started if alive(pid)]
