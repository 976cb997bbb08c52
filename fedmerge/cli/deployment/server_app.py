"""The server's side of the Flower app, as `pyproject.toml` names it: a scenario's experts from hospitals into the pool."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmerge.errors import FedmergeError, Problem, ScenarioError
from fedmerge.experiment.experiment import RunOptions, load_experiment
from fedmerge.experiment.run import prepare
from fedmerge.federated.flower.coordinator import GridBackend
from fedmerge.system.files import at_home

APP = Path(__file__).resolve().parents[3]
"""The folder of the app as Flower has unpacked it; scenarios and sites travel with it."""


def server_app() -> Any:
    """What Flower runs. A federation that fails makes the run fail: its status is then `finished:failed`."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.superlink.grid import InMemoryGrid

    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def story(grid: Grid, context: Context) -> None:
        try:
            conduct(grid, context.run_config, isinstance(grid, InMemoryGrid))
        except FedmergeError as error:
            print(f"fedmerge: {error}", flush=True)  # before Flower's traceback
            raise

    return app


def conduct(grid: Any, config: Mapping[str, Any], simulated: bool) -> None:
    """Read the scenario, ask the hospitals, fill the pool. Raises FedmergeError."""
    root = at_home(str(config["root"])) if config["root"] else None
    if root and not root.is_absolute():
        raise ScenarioError([Problem("--run-config", "root", f"'{root}'", "an absolute folder, or nothing")])
    experiment = load_experiment(
        (root or APP) / str(config["scenario"]), at_target=False
    )  # a generalist is for the merges, which are not done here
    out = str(config["out"]) or f"runs/{experiment.scenario.name}-{experiment.scenario.seed}"
    here = root or Path.cwd()
    options = RunOptions(out=here / out, pool=here / (str(config["pool"]) or "pool"))
    print(f"fedmerge: pool {options.pool}, run folder {options.out}", flush=True)
    prepare(experiment, options, GridBackend(grid, _seconds(config["connect-s"]), "assigned" if simulated else "come"))
    print(f"fedmerge: experts are in {options.pool}", flush=True)


def _seconds(given: Any) -> float:
    """How long hospitals may take to connect."""
    try:
        seconds = 0.0 if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ScenarioError(
            [Problem("--run-config", "connect-s", f"'{given}'", "a finite number of seconds, more than 0, e.g. 120")]
        )
    return seconds


app = server_app()
