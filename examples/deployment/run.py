"""A whole deployment on this machine: a SuperLink and one SuperNode a hospital, TLS and authentication on, and then the target.

    python examples/deployment/run.py scenarios/organs.yaml --out runs/deployment

The hospitals train in their own processes, each with its own site file alone; signed experts arrive in the coordinator's pool; then
the target merges them by `python -m fedmerge.simulate`, and nobody trains. See docs/deployment.md.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from loopback import DeploymentError, Loopback

from fedmerge.errors import FedmergeError


def main(
    scenario: Annotated[Path, typer.Argument(help="the scenario's YAML")] = Path("scenarios/organs.yaml"),
    out: Annotated[Path, typer.Option(help="a folder that is not there yet")] = Path("runs/deployment"),
    merge: Annotated[bool, typer.Option(help="let the target merge when the experts have arrived")] = True,
) -> None:
    """Train the hospitals of SCENARIO in processes of their own, and merge at its target."""
    if out.exists():
        raise typer.BadParameter(f"{out} is there; expected a folder that is not, for keys and certificates are made anew")
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell in the background has told us to ignore Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        deploy(scenario, out, merge)
    except (DeploymentError, FedmergeError) as error:
        typer.echo(f"deployment: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("deployment: interrupted; everything that was started has ended", err=True)
        raise typer.Exit(130) from None


def deploy(scenario: Path, out: Path, merge: bool) -> None:
    """The whole story."""
    began = time.monotonic()

    def say(text: str) -> None:
        typer.echo(f"{time.monotonic() - began:6.1f} s  {text}")

    with Loopback(out, scenario) as here:
        sites = here.prepare()
        say(f"folders, keys and certificates for {', '.join(sites)} in {out}")
        here.start_link()
        say(f"SuperLink on 127.0.0.1:{here.port}")
        for site in sites:
            here.register(site)
            here.start_node(site)
        say("SuperNodes started; flwr run")
        ended = here.run()
        typer.echo(ended.said)
        if ended.status != "finished:completed":
            raise DeploymentError(f"the run ended as '{ended.status}': {ended.details}")
        say(f"experts in {here.pool}")
    say("everything that was started has ended")
    if merge:
        words = [here.target / "scenarios" / scenario.name, "--pool", here.pool, "--out", here.target / "run"]
        command = [sys.executable, "-m", "fedmerge.simulate", *map(str, words)]
        done = subprocess.run(command, env=here.environment(here.target), cwd=here.target)
        say("the target has merged" if done.returncode == 0 else "the target could not merge")
        if done.returncode:
            raise typer.Exit(done.returncode)


if __name__ == "__main__":
    typer.run(main)
