"""Hospitals as Flower clients: the same calls as `local`, with the federation in a process of its own.

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
from fedmerge.federated.messages import START_GRACE_S, Initial, Job, OnTick, Outcome, Tick
from fedmerge.federated.pool.experts import ExpertPool
from fedmerge.federated.security.signing import VARIABLE, keys_folder
from fedmerge.federated.server.collect import incomplete
from fedmerge.federated.server.rounds import unfinished
from fedmerge.system.offline import sealed

MOST_ROUNDS = 200
"""More blocks of layers than any model has."""


class SimulationBackend:
    """Hospitals as Flower clients on this machine, in a process of their own."""

    def gather(self, job: Job, on_tick: OnTick) -> dict[str, Outcome]:
        """Ask every site for what is not in the pool, as Flower clients; nothing is started if nothing is missing."""
        pool = ExpertPool(job.pool)
        untrained = [task for task in job.tasks if not pool.has(task)]
        if not incomplete(job):
            return {task.site.name: Outcome(task.site.name, False) for task in job.tasks}
        said = _in_child("gather", job, on_tick)
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
        said = _in_child("compete", job, on_tick)
        told: dict[str, str] = said.get("federated", {})
        return {strategy.key: told.get(strategy.key) or said["failure"] for strategy in open_ones if strategy in unfinished(job)}

    def probe(self, job: Job, on_tick: OnTick) -> Initial:
        """theta_0 with a head from federated linear probing among Flower clients. Raises SiteError."""
        from safetensors.torch import load_file

        with tempfile.TemporaryDirectory() as folder:
            said = _in_child("probe", job, on_tick, keep=Path(folder) / "theta_0.safetensors")
            if said["failure"]:
                raise SiteError(said["failure"])
            weights = load_file(Path(folder) / "theta_0.safetensors")
        return replace(job.initial, weights=weights, sha256=said["sha256"])


def _in_child(what: str, job: Job, on_tick: OnTick, keep: Path | None = None) -> dict[str, Any]:
    """Run the Flower seam as a process of its own until it is done, or past its deadline; it never outlives this call."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="fedmerge-") as name, (job.audit.parent / "federation.log").open("a") as log:
        folder = Path(name)
        (folder / "ticks").mkdir()
        save_file({key: tensor.contiguous() for key, tensor in job.initial.weights.items()}, folder / "initial.safetensors")
        (folder / "job.json").write_text(_to_json(what, job, keep), encoding="utf-8")
        command = [sys.executable, "-m", "fedmerge.federated.flower.simulation", str(folder)]
        # Its standard input is closed when this process ends, even by kill -9; then it ends too: see `lifeline`.
        with sealed():
            here = {**os.environ, VARIABLE: str(keys_folder().absolute())}  # a hospital's process may start in another folder
            child = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.PIPE, start_new_session=True, env=here)
        try:
            _watch(child, folder, job.deadline_s * _waits(what, job) + START_GRACE_S, on_tick)
        finally:
            _end(child)
        said = folder / "said.json"
        if said.exists():
            answer: dict[str, Any] = json.loads(said.read_text(encoding="utf-8"))
            return answer
    return {"failure": f"the federation ended without an answer (see {job.audit.parent / 'federation.log'})", "outcomes": {}}


def _waits(what: str, job: Job) -> int:
    """At most so many times the coordinator waits for the hospitals' answers: once for each round of messages."""
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


def _end(child: subprocess.Popen[bytes]) -> None:
    """Give the child a moment to shut Ray down, then end whatever is left of its process group."""
    with suppress(subprocess.TimeoutExpired):
        child.wait(10)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(5)


def _to_json(what: str, job: Job, keep: Path | None) -> str:
    return json.dumps(
        {
            "what": what,
            "tasks": [task.model_dump(mode="json") for task in job.tasks],
            "initial": {name: getattr(job.initial, name) for name in ("sha256", "head_init", "description", "heads")},
            "limits": job.limits.model_dump(),
            "pool": str(job.pool.absolute()),
            "audit": str(job.audit.absolute()),
            "deadline_s": job.deadline_s,
            "at_least": job.at_least,
            "keep": str(keep) if keep else None,
        }
    )
