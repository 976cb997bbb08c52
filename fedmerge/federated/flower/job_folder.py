"""A job as a folder, for a federation in a process of its own: what is asked, theta_0, progress, and at the end the last word."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file

from fedmerge.errors import FedmergeError
from fedmerge.federated.flower.progress_files import begun
from fedmerge.federated.messages import Backend, Initial, Job, SiteTask
from fedmerge.federated.pool.tensor_file import save
from fedmerge.federated.security.limits import Limits
from fedmerge.system.files import atomic_write

What = Literal["gather", "probe", "compete"]

TICKS = "ticks"
"""The folder of progress below that of the job."""


def write_job(folder: Path, what: What, job: Job) -> None:
    """A job into an empty folder."""
    (folder / TICKS).mkdir()
    save(folder / "initial.safetensors", job.initial.weights)
    said = {
        "what": what,
        "tasks": [task.model_dump(mode="json") for task in job.tasks],
        "initial": {name: getattr(job.initial, name) for name in ("sha256", "head_init", "description", "heads")},
        "limits": job.limits.model_dump(),
        "pool": str(job.pool.absolute()),
        "audit": str(job.audit.absolute()),
        "deadline_s": job.deadline_s,
        "at_least": job.at_least,
    }
    (folder / "job.json").write_text(json.dumps(said), encoding="utf-8")


def read_job(folder: Path) -> tuple[What, Job]:
    """The job of a folder."""
    read = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    initial = Initial(load_file(folder / "initial.safetensors"), **read["initial"])
    tasks = tuple(SiteTask.model_validate(task) for task in read["tasks"])
    pool, audit, limits = Path(read["pool"]), Path(read["audit"]), Limits(**read["limits"])
    return read["what"], Job(tasks, initial, pool, audit, read["deadline_s"], read["at_least"], limits)


def carry_out(folder: Path, what: What, job: Job, backend: Backend) -> None:
    """Run a job, and leave the last word in its folder, whole or not at all."""
    said: dict[str, Any] = {"failure": "", "outcomes": {}, "federated": {}}
    try:
        if what == "gather":
            found = backend.gather(job, lambda _: None)
            tries = {name: begun(folder / TICKS, name) or one.tries for name, one in found.items()}
            said["outcomes"] = {name: asdict(replace(one, tries=tries[name])) for name, one in found.items()}
        elif what == "compete":
            said["federated"] = backend.compete(job, lambda _: None)
        else:
            probed = backend.probe(job, lambda _: None)
            save(folder / "probed.safetensors", probed.weights)
            said["sha256"] = probed.sha256
    except FedmergeError as error:
        said["failure"] = str(error)
    atomic_write(folder / "said.json", json.dumps(said))


def last_word(folder: Path) -> dict[str, Any] | None:
    """How a job ended, if it has: why it failed, outcomes by site, models that are missing by key, theta_0 after probing."""
    file = folder / "said.json"
    if not file.exists():
        return None
    said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if "sha256" in said:
        said["weights"] = load_file(folder / "probed.safetensors")
    return said
