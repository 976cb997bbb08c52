"""The Flower app of one job: the server finds the job in a folder on its own machine, the hospitals are who they say.

Flower carries no code of ours here: the app that it unpacks names this module, and every process imports the fedmerge that is
installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedmerge.federated.flower.client import client_app
from fedmerge.federated.flower.coordinator import GridBackend
from fedmerge.federated.flower.job_folder import carry_out, read_job
from fedmerge.federated.flower.node_identity import OwnFile

CONNECT_S = 120.0
"""Longest wait for the SuperNodes of this machine, seconds."""


def job_server() -> Any:
    """The server's side; `folder` of the run's config is where the job is."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp

    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def story(grid: Grid, context: Context) -> None:
        folder = Path(str(context.run_config["folder"]))
        what, job = read_job(folder)
        carry_out(folder, what, job, GridBackend(grid, CONNECT_S))

    return app


client = client_app(OwnFile())
server = job_server()
