"""The federation in Flower's own simulation, in a process of its own.

Run as `python -m fedmerge.federated.flower.simulation FOLDER`, with the job in the folder; progress and the last word are left
there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedmerge.errors import FedmergeError
from fedmerge.federated.flower.client import Listed, client_app
from fedmerge.federated.flower.grid import asking
from fedmerge.federated.flower.progress_files import begun
from fedmerge.federated.messages import Ask, Initial, Job, SiteTask
from fedmerge.federated.security.limits import Limits
from fedmerge.federated.server.collect import collect, incomplete, probe_head
from fedmerge.federated.server.rounds import compete
from fedmerge.system.process import cores, end_with_parent


def run_job(folder: Path) -> None:
    """Coordinator: read the job, run the federation, say how it ended. The last word is written whole or not at all."""
    from safetensors.torch import load_file, save_file

    read = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    initial = Initial(load_file(folder / "initial.safetensors"), **read["initial"])
    tasks = tuple(SiteTask.model_validate(task) for task in read["tasks"])
    pool, audit, limits = Path(read["pool"]), Path(read["audit"]), Limits(**read["limits"])
    job = Job(tasks, initial, pool, audit, read["deadline_s"], read["at_least"], limits)
    said: dict[str, Any] = {"failure": "", "outcomes": {}}
    asked = incomplete(job) if read["what"] == "gather" else list(tasks)

    def program(ask: Ask) -> None:
        """Say the last word here: after this, Flower waits for ever for a client that is stuck."""
        try:
            if read["what"] == "gather":
                found = {name: replace(one, tries=begun(folder / "ticks", name)) for name, one in collect(job, ask).items()}
                said["outcomes"] = {name: asdict(outcome) for name, outcome in found.items()}
            elif read["what"] == "compete":
                said["federated"] = compete(job, ask)
            else:
                probed = probe_head(job, ask)
                save_file({name: tensor.contiguous() for name, tensor in probed.weights.items()}, read["keep"])
                said["sha256"] = probed.sha256
        except FedmergeError as error:
            said["failure"] = str(error)
        (folder / "said.draft").write_text(json.dumps(said), encoding="utf-8")
        (folder / "said.draft").replace(folder / "said.json")

    run_flower(job, asked, client_app(Listed(asked), folder / "ticks"), program)


def run_flower(job: Job, asked: list[SiteTask], client: Any, program: Callable[[Ask], None]) -> None:
    """Flower's simulation with one SuperNode for each site; `program` is the server's whole story, `client` the hospitals'."""
    import torch
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator]
    def story(grid: Grid, context: Context) -> None:
        program(asking(grid, asked, job))

    count = cores()
    share = torch.cuda.device_count() / min(len(asked), count) if torch.cuda.is_available() else 0.0
    share = share if share < 1 else share // 1  # above one, Ray takes whole GPUs only
    gpus = float(os.environ.get("FEDMERGE_HOSPITAL_GPUS", share))  # of a cluster, this machine does not know how many there are
    # Ray counts all cores of a node for clients, so nothing else may reserve one. A client that is killed starts anew, and Ray
    # asks it again as often as declared; every hospital may use that up, and the process must still be there for the others.
    retries = asked[0].training.retries
    restarts = 4 + (retries + 1) * len(asked)
    resources = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": restarts, "max_task_retries": retries}
    outside = os.environ.get("RAY_ADDRESS")
    arguments = {"num_cpus": count, "include_dashboard": False, "log_to_driver": False}
    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=len(asked),
        backend_config={
            "client_resources": resources,
            "init_args": {"address": outside.strip()} if outside else arguments | {"address": "local"},
        },
    )


if __name__ == "__main__":
    end_with_parent()
    run_job(Path(sys.argv[1]))
