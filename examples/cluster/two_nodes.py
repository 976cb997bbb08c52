"""A Ray cluster of two nodes on one machine: hospitals on one, the target on the other.

    python examples/cluster/two_nodes.py scenarios/organs.yaml --methods mean,ensemble,eam
    python examples/cluster/two_nodes.py --tls scenarios/organs.yaml

What comes after the scenario goes to `fedmerge simulate`. The head has the CPUs, so Flower's clients, the hospitals, are there. The
second node has no CPU and declares the resource `target`, so the target's actor is there, and its shards if there are any. Both
nodes, and nothing else, are ended when the run is over. With --tls all that travels between processes is encrypted, and who has no
certificate by the authority that is made for this run is turned away. Linux: processes are found in /proc.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fedmerge.federated.security.certificates import issue
from fedmerge.system.files import write_secret
from fedmerge.system.offline import sealed

START_S = 60.0
END_S = 20.0

CLUSTER = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1", "RAY_USAGE_STATS_ENABLED": "0"}
"""fedmerge's own Ray is of one node only, which is switched off by this name on Linux too, before Ray is imported."""


def main(scenario: str, *options: str, tls: bool = False) -> int:
    """Start both nodes, run the scenario, end both nodes."""
    os.environ.update(CLUSTER)
    port, cores = _free_port(), len(os.sched_getaffinity(0))
    address = f"127.0.0.1:{port}"
    head = ("--head", f"--port={port}", "--node-ip-address=127.0.0.1", f"--num-cpus={cores}", "--include-dashboard=false")
    ward = (f"--address={address}", "--node-ip-address=127.0.0.1", "--num-cpus=0", f"--resources={json.dumps({'target': 1})}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fm-", ignore_cleanup_errors=True)))
        if tls:
            encrypt(folder / "tls")
        stack.enter_context(node(folder / "head", *head))
        _wait_for(port)
        stack.enter_context(node(folder / "ward", *ward))
        _wait_for_nodes(address, 2, folder / "ward" / "ray-start.log")
        print(f"two nodes at {address}", flush=True)
        command = [sys.executable, "-m", "fedmerge.simulate", scenario, *options]
        return subprocess.run(command, env=os.environ | {"RAY_ADDRESS": address}).returncode


def encrypt(folder: Path) -> None:
    """Let Ray speak TLS from here on. On several machines each has a certificate of its own, for its own address."""
    files = {"SERVER_CERT": folder / "node.crt", "SERVER_KEY": folder / "node.key", "CA_CERT": folder / "ca.crt"}
    os.environ.update({"RAY_USE_TLS": "1"} | {f"RAY_TLS_{name}": str(file) for name, file in files.items()})
    # one port of each node, for the environments of workers, speaks plain HTTP in spite of TLS; it heeds a token
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")})
    write_secret(folder / "token", secrets.token_hex(32).encode())
    import ray  # after the environment is set, which it reads once

    issue(folder, "node", ["localhost", "127.0.0.1", ray.util.get_node_ip_address()])


@contextmanager
def node(folder: Path, *options: str) -> Iterator[int]:
    """One `ray start` with a folder of its own, in a session of its own; whatever is left of that session is ended."""
    folder.mkdir()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--temp-dir={folder}", *options]
    with (folder / "ray-start.log").open("wb") as log, sealed():
        started = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield started.pid
    finally:
        # children of a session's processes may have made sessions of their own, so descendants are looked up while they are there
        mine = {started.pid, *_below(started.pid)}
        for number in (signal.SIGTERM, signal.SIGKILL):
            _signal(mine if number == signal.SIGKILL else {started.pid}, number)
            with suppress(subprocess.TimeoutExpired):
                started.wait(END_S)


def _below(parent: int) -> set[int]:
    """All descendants of a process."""
    children: dict[int, set[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children.setdefault(int(entry.read_text().rpartition(")")[2].split()[1]), set()).add(int(entry.parent.name))
    found, left = set[int](), [parent]
    while left:
        new = children.get(left.pop(), set()) - found
        found |= new
        left += new
    return found


def _signal(processes: set[int], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait_for(port: int) -> None:
    began = time.monotonic()
    while time.monotonic() - began < START_S:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        time.sleep(0.2)
    raise SystemExit(f"Ray's head did not start within {START_S:g} s")


def _wait_for_nodes(address: str, count: int, log: Path) -> None:
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        began = time.monotonic()
        while sum(one["Alive"] for one in ray.nodes()) < count:
            if time.monotonic() - began > START_S:
                raise SystemExit(f"the second node did not come within {START_S:g} s:\n{log.read_text()}")
            time.sleep(0.2)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        raise SystemExit
    given = [word for word in sys.argv[1:] if word != "--tls"]
    raise SystemExit(main(*(given or ["scenarios/organs.yaml"]), tls="--tls" in sys.argv))
