"""On a cluster that speaks TLS, somebody who hears every byte between its processes learns no weight and no name."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.front_door import same_predictions, world

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cluster" / "two_nodes.py"
ALL_PROTOCOLS = 3
SO_RCVBUFFORCE = 33
"""Of Linux; Python has no name for it."""

HEARD_AT_ONCE = 1 << 28
"""Bytes that wait to be heard: on a busy machine the ear is slow."""

PIECE = 64
"""Bytes of an array that count as heard: sixteen float32, which do not come about by chance."""


@contextmanager
def overheard(file: Path) -> Iterator[None]:
    """Everything that goes over loopback meanwhile, as it is on the line, into a file."""
    try:
        ear = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(ALL_PROTOCOLS))
    except (AttributeError, PermissionError):
        pytest.skip("listening to loopback takes Linux and the rights of root")
    ear.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, HEARD_AT_ONCE)
    ear.bind(("lo", 0))
    ear.settimeout(0.2)
    over = threading.Event()

    def listen() -> None:
        with file.open("wb") as heard:
            while not over.is_set():
                try:
                    heard.write(ear.recv(1 << 17))
                except TimeoutError:
                    continue

    listening = threading.Thread(target=listen)
    listening.start()
    try:
        yield
    finally:
        over.set()
        listening.join()
        ear.close()


def run(folder: Path, name: str, *first: str) -> bytes:
    """One run on two nodes from an empty pool; what was heard of it."""
    command = [sys.executable, str(EXAMPLE), *first, "scenarios/tiny.yaml", "--backend", "simulation"]
    command += ["--set", "target.shards=2"]
    command += ["--pool", f"pool-{name}", "--out", f"runs/{name}"]
    with overheard(folder / f"{name}.heard"):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return (folder / f"{name}.heard").read_bytes()


def pieces(pool: Path) -> Iterator[bytes]:
    """Some bytes of every array of every expert."""
    from safetensors.numpy import load_file

    for file in sorted(pool.glob("experts/*/expert.safetensors")):
        for array in load_file(file).values():
            if array.nbytes >= 4 * PIECE:
                middle = array.nbytes // 8 * 4
                yield array.tobytes()[middle : middle + PIECE]


def with_own_names(folder: Path) -> bytes:
    """The small federation with a hospital whose name no other run on this machine says; that name."""
    name = f"ward-{secrets.token_hex(6)}"
    scenario = yaml.safe_load(world(folder).read_text())
    (folder / "sites" / f"{name}.yaml").write_text((folder / "sites" / "north.yaml").read_text().replace("north", name))
    (folder / "scenarios" / "tiny.yaml").write_text(yaml.safe_dump({**scenario, "sites": [name, "south"]}))
    return name.encode()


def test_nothing_is_heard_and_nothing_else_changes(tmp_path: Path) -> None:
    name = with_own_names(tmp_path)
    plain, encrypted = run(tmp_path, "plain"), run(tmp_path, "tls", "--tls")
    wanted = list(pieces(tmp_path / "pool-tls"))
    assert wanted == list(pieces(tmp_path / "pool-plain"))
    assert len(wanted) > 10
    assert sum(piece in plain for piece in wanted) > len(wanted) / 2  # or this test would not hear anything
    assert plain.count(name) > 0
    assert [piece for piece in wanted if piece in encrypted] == []
    assert encrypted.count(name) == 0
    assert len(encrypted) > sum(file.stat().st_size for file in tmp_path.glob("pool-tls/experts/*/expert.safetensors"))
    assert same_predictions(tmp_path / "runs" / "plain", tmp_path / "runs" / "tls")
