"""The Flower app of one job: the coordinator finds the job in a folder on its own machine, the hospitals are who they say.

Flower carries no code of ours here: the app that it unpacks names this module, and every process imports the fedmerge that is
installed.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmerge.federated.flower.client import client_app
from fedmerge.federated.flower.coordinator import GridBackend
from fedmerge.federated.flower.job_folder import carry_out, read_job
from fedmerge.federated.flower.node_identity import OwnFile

CONNECT_S = 120.0
"""Longest wait for the SuperNodes of this machine, seconds."""

client = client_app(OwnFile())
server = ServerApp()


@server.main()  # type: ignore[untyped-decorator]
def carry_out_job(grid: Grid, context: Context) -> None:
    """The coordinator's whole story. run_config: `folder`, where the job is."""
    folder = Path(str(context.run_config["folder"]))
    what, job = read_job(folder)
    carry_out(folder, what, job, GridBackend(grid, CONNECT_S))
