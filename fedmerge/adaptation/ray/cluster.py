"""The Ray that a run uses: one of its own on this machine, or the cluster at `RAY_ADDRESS`."""

from __future__ import annotations

import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmerge.adaptation.ray.placement import Nodes, Wanted
from fedmerge.adaptation.ray.tls_check import disagreements
from fedmerge.adaptation.ray.waiting import knock
from fedmerge.errors import Problem, ScenarioError, TargetError, first_line
from fedmerge.system.offline import sealed
from fedmerge.system.process import SOCKET_BYTES, cores, own_signals

START_ATTEMPTS = 3
"""How often Ray is started before that counts as a failure."""

SOCKET = "/ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest path that Ray makes below the folder for temporary files."""

ADDRESS = re.compile(r"([^\s:/\[\]]+|\[[0-9a-f:.]+\]):([0-9]+)", re.IGNORECASE)
"""HOST:PORT, with an IPv6 address in brackets."""

LAST_PORT = 65535

TOKEN = "Where its nodes have a token (RAY_AUTH_MODE=token), this command needs the same: RAY_AUTH_TOKEN_PATH names its file"


def preflight(wanted: Wanted) -> None:
    """Before anybody trains: whether there is a place for everything. Raises ScenarioError that names what is not there."""
    wanted = replace(wanted, each=_of_each_hospital())
    if not os.environ.get("RAY_ADDRESS"):
        see_to_sockets()
        wanted.place([_this_machine()])
        return
    import ray

    with started_ray(ray):
        wanted.place(nodes(ray))


@contextmanager
def shared_ray() -> Iterator[str]:
    """A Ray of this process, and the address at which other processes reach it. Raises TargetError."""
    import ray

    with started_ray(ray):
        yield str(ray.get_runtime_context().gcs_address)


@contextmanager
def started_ray(ray: Any) -> Iterator[None]:
    """A Ray to work with: that of the caller, as a notebook has one, which stays; else one that ends with the block."""
    if ray.is_initialized():
        yield
        return
    start_ray(ray)
    try:
        yield
    finally:
        ray.shutdown()


def see_to_sockets() -> None:
    """Raises ScenarioError if a Ray of our own cannot make its sockets, since the folder for temporary files is too deep or locked.

    Ray itself says so after minutes, in a log.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "")
    if not name:
        return
    folder = Path(os.environ[name])
    length, most = len(os.fsencode(folder.absolute())), SOCKET_BYTES - len(SOCKET)
    mend = "Set RAY_TMPDIR=/tmp, or another short folder: Ray keeps its sockets there"
    if length > most:
        found, expected = f"a path of {length} characters", f"at most {most}, since Ray's sockets allow no more"
        raise ScenarioError([Problem(name, "", found, expected, mend)])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        found = f"'{folder}', which cannot be written ({error.strerror})"
        raise ScenarioError([Problem(name, "", found, "a folder for temporary files", mend)]) from None


def start_ray(ray: Any) -> None:
    """Connect to `RAY_ADDRESS`, or start Ray for this process alone; Ray itself gives up after half a minute on a busy machine.

    Raises ScenarioError if nobody answers at that address or lets us in, and TargetError if Ray cannot be started.
    """
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "namespace": f"fedmerge-{uuid.uuid4().hex[:12]}"}
    given = os.environ.get("RAY_ADDRESS")
    outside = head_at(given) if given else ""
    if not outside:
        see_to_sockets()
    own: dict[str, Any] = {"address": "local", "num_cpus": cores(), "include_dashboard": False}
    where = {"address": outside} if outside else own
    for attempt in range(START_ATTEMPTS):
        try:
            with own_signals(), nullcontext() if outside else sealed():
                ray.init(**where, **quiet)
            return
        except Exception as error:  # a bare Exception is what Ray raises where its daemons are too slow to start
            ray.shutdown()
            said = first_line(error).partition(". ")[0]
            if outside:
                expected = "a cluster that lets this command in"
                raise ScenarioError([Problem("RAY_ADDRESS", "", f"'{outside}' ({said})", expected, TOKEN)]) from None
            if attempt == START_ATTEMPTS - 1:
                raise TargetError(f"Ray cannot be started: {said}") from None


def nodes(ray: Any) -> Nodes:
    """What every node that is alive declares, by resource."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def head_at(given: str) -> str:
    """The address of a head that answers, and speaks as this process does. Raises ScenarioError if there is none.

    Ray would try for minutes, and for `auto` look up the Ray of another run. Blanks around an address are no part of it; blanks
    alone are one that was forgotten, and not the wish for a Ray of one's own.
    """
    mend = "Start one with 'ray start --head', or unset RAY_ADDRESS: then a run starts its own Ray on this machine"
    found, expected = f"'{given}'", "HOST:PORT of the head of a Ray cluster"
    if not (plain := ADDRESS.fullmatch(given.strip())):
        raise ScenarioError([Problem("RAY_ADDRESS", "", found, expected, mend)])
    host, port = plain.groups()
    if len(port) > len(str(LAST_PORT)) or not 0 < int(port) <= LAST_PORT:
        expected = f"{expected}, with a port from 1 to {LAST_PORT}"
        raise ScenarioError([Problem("RAY_ADDRESS", "", f"{found}, and {port} is no port", expected, mend)])
    if why := knock(host, int(port)):
        raise ScenarioError([Problem("RAY_ADDRESS", "", f"{found}, where nobody answers ({why})", expected, mend)])
    if problems := disagreements(host.strip("[]"), int(port)):
        raise ScenarioError(problems)
    return plain[0]


def _of_each_hospital() -> float:
    given = os.environ.get("FEDMERGE_HOSPITAL_GPUS", "0")
    try:
        share = float(given)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise ScenarioError([Problem("FEDMERGE_HOSPITAL_GPUS", "", f"'{given}'", "GPUs of each hospital, e.g. 0.25")])
    return share


def _this_machine() -> dict[str, float]:
    import torch

    return {"CPU": cores(), "GPU": torch.cuda.device_count() if torch.cuda.is_available() else 0}
