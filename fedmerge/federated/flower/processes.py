"""The backend `deployment`: a SuperLink, a SuperNode for each site, and the server's ServerApp, as processes of this machine.

They speak over loopback without TLS, and nobody else can reach them; for hospitals on machines of their own see docs/deployment.md.
`python -m fedmerge.federated.flower.processes FOLDER` starts all of them in its own process group, with the job in the folder.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import yaml

from fedmerge.federated.flower.job_app import CONNECT_S
from fedmerge.federated.flower.job_folder import TICKS, last_word, read_job
from fedmerge.federated.flower.launcher import ChildBackend
from fedmerge.federated.messages import START_GRACE_S, SiteTask
from fedmerge.federated.server.collect import incomplete
from fedmerge.system.process import end_with_parent

APP = """\
[project]
name = "fedmerge-job"
version = "1.0.0"
description = "One job of fedmerge"

[tool.flwr.app]
publisher = "fedmerge"

[tool.flwr.app.components]
serverapp = "fedmerge.federated.flower.job_app:server"
clientapp = "fedmerge.federated.flower.job_app:client"

[tool.flwr.app.config]
folder = ""
"""

CONNECTION = """\
[superlink]
default = "loopback"

[superlink.loopback]
address = "{address}"
insecure = true
"""

START_S = 60.0
"""Longest wait for the SuperLink, seconds."""


class ProcessesBackend(ChildBackend):
    """Hospitals in Flower processes of their own on this machine, each with its own site file alone."""

    module = "fedmerge.federated.flower.processes"
    grace_s = START_GRACE_S + CONNECT_S


def run_processes(folder: Path) -> None:
    """Start the processes, and end them when the server has said its last word, or its run has ended."""
    what, job = read_job(folder)
    asked = incomplete(job) if what == "gather" else list(job.tasks)
    address = f"127.0.0.1:{free_port()}"
    (folder / "flwr").mkdir()
    (folder / "flwr" / "config.toml").write_text(CONNECTION.format(address=address), encoding="utf-8")
    (folder / "app").mkdir()
    (folder / "app" / "pyproject.toml").write_text(APP, encoding="utf-8")
    (folder / "run.toml").write_text(f"folder = {json.dumps(str(folder))}\n", encoding="utf-8")
    host, port = address.split(":")
    with _ended_at_last() as start:
        # In isolation "process" the SuperLink leaves it to us to start the SuperExec, which it would put into a session of its own.
        link = start(folder, "flower-superlink", "--insecure", "--host", host, "--port", port, "--isolation", "process")
        _wait_for(link, address)
        start(folder, "flower-superexec", "--insecure", "--runtime-api-address", address, "--parent-pid", str(link.pid))
        for task in asked:
            config = _node_config(folder, task)
            node = ["--insecure", "--superlink", address, "--port", str(free_port()), "--node-config", config]
            start(folder, "flower-supernode", *node)
        run = start(folder, "flwr", "run", str(folder / "app"), "loopback", "--stream", "--run-config", str(folder / "run.toml"))
        while run.poll() is None and not last_word(folder):
            time.sleep(0.1)


def _node_config(folder: Path, task: SiteTask) -> str:
    """Writes a hospital's site file, and says how its SuperNode is told where it is, and where progress is left."""
    file = folder / "sites" / f"{task.site.name}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(task.site.model_dump(mode="json")), encoding="utf-8")
    return f'site="{file}" progress="{folder / TICKS}"'


@contextmanager
def _ended_at_last() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """A way to start processes of Flower's, which end with the context."""
    started: list[subprocess.Popen[bytes]] = []

    def start(folder: Path, tool: str, *words: str) -> subprocess.Popen[bytes]:
        command = [str(Path(sys.executable).parent / tool), *words]
        started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, env=_environment(folder)))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.terminate()
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)
            process.kill()
            process.wait()


def _environment(folder: Path) -> dict[str, str]:
    """Flower's own folder is below the job's; its tools, and fedmerge, are found wherever a process starts."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    code = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "FLWR_HOME": str(folder / "flwr"), "PATH": path, "PYTHONPATH": code}


def _wait_for(link: subprocess.Popen[bytes], address: str) -> None:
    """Until the SuperLink answers; who waits for the server's last word reads in the log why it never comes."""
    began = time.monotonic()
    while not _healthy(address):
        if link.poll() is not None or time.monotonic() - began > START_S:
            raise SystemExit("the SuperLink did not start")
        time.sleep(0.2)


def _healthy(address: str) -> bool:
    with closing(http.client.HTTPConnection(address, timeout=2)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    end_with_parent()
    run_processes(Path(sys.argv[1]))
