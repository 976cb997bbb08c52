"""A federation of Flower clients in a process of its own, and the backend `simulation`.

Flower's simulation cannot be left while a client is stuck, so a deadline has to be kept from outside: the federation runs in a
child process with a process group of its own, which never outlives the call. The expert pool on disk is the border: the child
fills it as uploads arrive.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmerge.errors import SiteError
from fedmerge.federated.client.linear_probe import ROUNDS
from fedmerge.federated.flower.job_folder import What, last_word, write_job
from fedmerge.federated.messages import START_GRACE_S, Initial, Job, OnTick, Outcome, Tick
from fedmerge.federated.pool.experts import ExpertPool
from fedmerge.federated.security.signing import VARIABLE, keys_folder
from fedmerge.federated.server.collect import incomplete
from fedmerge.federated.server.rounds import unfinished
from fedmerge.system.offline import sealed
from fedmerge.system.process import cores, make_core_slots

MOST_ROUNDS = 200
"""More blocks of layers than any model has."""

ARRIVAL_S = 1.0
"""What a hospital may take to say who it is, while it takes turns with the others, seconds."""

STOP_S = 10.0
"""What a federation that has said its last word may take to end, seconds."""


class ChildBackend:
    """Hospitals as Flower clients on this machine, in a process of their own: `python -m <module> FOLDER`, see `job_folder`.

    grace_s: what they may take to start and to stop, on top of the hospitals' deadlines, seconds.
    """

    module: str
    grace_s = START_GRACE_S

    def gather(self, job: Job, on_tick: OnTick) -> dict[str, Outcome]:
        """Ask every site for what is not in the pool, as Flower clients; nothing is started if nothing is missing."""
        pool = ExpertPool(job.pool)
        untrained = [task for task in job.tasks if not pool.has(task)]
        if not incomplete(job):
            return {task.site.name: Outcome(task.site.name, False) for task in job.tasks}
        said = self._in_child("gather", job, on_tick)
        told = {name: Outcome(**outcome) for name, outcome in said["outcomes"].items()}
        left = incomplete(job)
        return {
            task.site.name: told.get(task.site.name)
            or Outcome(task.site.name, task in untrained and pool.has(task), said["failure"] if task in left else "")
            for task in job.tasks  # where the child died before it could tell, what has arrived is in the pool
        }

    def compete(self, job: Job, on_tick: OnTick) -> dict[str, str]:
        """The rounds of all strategies among Flower clients; why there is no model, by key. None starts if all are there."""
        if not (open_ones := unfinished(job)):
            return {}
        said = self._in_child("compete", job, on_tick)
        told: dict[str, str] = said["federated"]
        return {strategy.key: told.get(strategy.key) or said["failure"] for strategy in open_ones if strategy in unfinished(job)}

    def probe(self, job: Job, on_tick: OnTick) -> Initial:
        """theta_0 with a head from federated linear probing among Flower clients. Raises SiteError."""
        said = self._in_child("probe", job, on_tick)
        if said["failure"]:
            raise SiteError(said["failure"])
        return replace(job.initial, weights=said["weights"], sha256=said["sha256"])

    def _in_child(self, what: What, job: Job, on_tick: OnTick) -> dict[str, Any]:
        """Run the job until it is done, or past its deadline; the process never outlives this call."""
        with tempfile.TemporaryDirectory(prefix="fedmerge-") as name, (job.audit.parent / "federation.log").open("a") as log:
            folder = Path(name)
            write_job(folder, what, job)
            command = [sys.executable, "-m", self.module, str(folder)]
            # Its standard input is closed when this process ends, even by kill -9; then it ends too: see `end_with_parent`.
            with sealed():
                slots = make_core_slots(folder / "slots", cores() // job.tasks[0].training.threads)
                keys = {VARIABLE: str(keys_folder().absolute())}  # a hospital may start in another folder
                here = {**os.environ, **keys, **slots}
                child = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.PIPE, start_new_session=True, env=here)
            patience_s = 0.0
            try:
                _watch(child, folder, job.deadline_s * _waits(what, job) + self.grace_s + ARRIVAL_S * len(job.tasks), on_tick)
                patience_s = STOP_S
            finally:
                _end(child, patience_s)
            if said := last_word(folder):
                return said
        failure = f"the federation ended without an answer (see {job.audit.parent / 'federation.log'})"
        return {"failure": failure, "outcomes": {}, "federated": {}}


class SimulationBackend(ChildBackend):
    """Hospitals in Flower's simulation."""

    module = "fedmerge.federated.flower.simulation"


def _waits(what: What, job: Job) -> int:
    """At most so many times the server waits for the hospitals' answers: once for each round of messages."""
    if what == "probe":
        return ROUNDS
    if what == "compete":
        return sum(strategy.rounds for strategy in unfinished(job))
    again = len(job.tasks) if job.at_least else 1  # without a site that fails, the others are asked anew
    return 1 + again * sum(MOST_ROUNDS if statistic.starts_from == "rounds" else 1 for statistic in job.tasks[0].uploads)


def _watch(child: subprocess.Popen[bytes], folder: Path, deadline_s: float, on_tick: OnTick) -> None:
    """Pass progress on until the child has said its last word, has ended, or the deadline has passed."""
    began, told = time.monotonic(), dict[str, str]()
    while child.poll() is None and not (folder / "said.json").exists() and time.monotonic() - began < deadline_s:
        time.sleep(0.1)
        for file in sorted((folder / "ticks").glob("*.json")):
            text = file.read_text(encoding="utf-8")
            if told.get(file.name) != text:
                told[file.name] = text
                on_tick(Tick(**json.loads(text)))


def _end(child: subprocess.Popen[bytes], patience_s: float) -> None:
    """Give the child a moment to end what it has started, then end whatever is left of its process group."""
    with suppress(subprocess.TimeoutExpired):
        child.wait(patience_s)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(5)
