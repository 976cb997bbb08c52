"""The federation in Flower's own simulation, in a process of its own: `python -m fedmerge.federated.flower.simulation FOLDER`.

The job is in the folder; progress and the last word are left there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmerge.federated.flower.client import Listed, client_app
from fedmerge.federated.flower.coordinator import GridBackend
from fedmerge.federated.flower.job_folder import TICKS, carry_out, read_job
from fedmerge.federated.messages import START_GRACE_S, Backend, Job, SiteTask
from fedmerge.federated.server.collect import incomplete
from fedmerge.system.process import cores, end_with_parent

ACTIVE_PER_CORE = 2
"""At most so many hospitals at a time, for each is a process with a model and images of its own in memory."""


def run_job(folder: Path) -> None:
    """Read the job, run the federation, say how it ended: after that, Flower waits for ever for a client that is stuck."""
    what, job = read_job(folder)
    asked = incomplete(job) if what == "gather" else list(job.tasks)
    run_flower(job, asked, client_app(Listed.of(asked), folder / TICKS), lambda backend: carry_out(folder, what, job, backend))


def run_flower(job: Job, asked: list[SiteTask], client: Any, program: Callable[[Backend], None]) -> None:
    """Flower's simulation with one SuperNode for each site; `program` is the server's whole story, `client` the hospitals'."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator]
    def story(grid: Grid, context: Context) -> None:
        program(GridBackend(grid, min(job.deadline_s, START_GRACE_S), "listed"))

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of hospitals' processes, however many cores each holds; training says its own
    outside = os.environ.get("RAY_ADDRESS")
    arguments = {"num_cpus": cores(), "include_dashboard": False, "log_to_driver": False}
    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=len(asked),
        backend_config={
            "client_resources": _resources(asked),
            "init_args": {"address": outside.strip()} if outside else arguments | {"address": "local"},
        },
    )


def _resources(asked: list[SiteTask]) -> dict[str, float]:
    """What a hospital's process holds.

    Ray counts all cores of a node for clients, so nothing else may reserve one. A client that is killed starts anew, and Ray asks
    it again as often as declared; every hospital may use that up, and the process must still be there for the others.
    """
    import torch

    share = torch.cuda.device_count() / min(len(asked), cores()) if torch.cuda.is_available() else 0.0
    share = share if share < 1 else share // 1  # above one, Ray takes whole GPUs only
    gpus = float(os.environ.get("FEDMERGE_HOSPITAL_GPUS", share))  # of a cluster, this machine does not know how many there are
    retries = asked[0].training.retries
    restarts = 4 + (retries + 1) * len(asked)
    cpus = 1.0 if os.environ.get("RAY_ADDRESS") else cpus_each(len(asked), cores())  # slots are of this machine alone
    return {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": restarts, "max_task_retries": retries}


def cpus_each(hospitals: int, count: int) -> float:
    """What each hospital holds of so many cores, so that more of them are active than there are cores, and none of these idles.

    Their runs share the cores by `core_slot`. Flower starts a process for each share that fits at once, of which no more are wanted
    than there are hospitals. Rounded down, for Ray counts in ten thousandths, above one in whole cores, and what is held must fit.
    """
    active = min(hospitals, ACTIVE_PER_CORE * count)
    return float(count // active) if active <= count else int(10_000 * count / active) / 10_000


if __name__ == "__main__":
    end_with_parent()
    run_job(Path(sys.argv[1]))
