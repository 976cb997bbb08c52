"""Where a cluster puts the target: on the machine that says so, or nowhere, with one clear error before anybody trains."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmerge.adaptation.ray import actor
from fedmerge.adaptation.ray.actor import RemoteTarget
from fedmerge.adaptation.ray.cluster import preflight
from fedmerge.adaptation.ray.placement import Nodes, Wanted
from fedmerge.adaptation.ray.waiting import wait
from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import TargetTask
from fedmerge.errors import ScenarioError
from tests.front_door import command, ray_address, world
from tests.targets import base, experts
from tests.unit.adaptation.test_shards import alike, spread

Targets = Callable[..., TargetTask]
LAPTOP: Nodes = [{"CPU": 2}]
WARD: Nodes = [{"CPU": 8, "GPU": 2}, {"CPU": 0, "target": 1, "GPU": 1}, {"CPU": 0, "shard": 3}]


@pytest.mark.parametrize(
    ("nodes", "wanted", "target", "shard"),
    [
        (LAPTOP, Wanted(), {"num_gpus": 0, "resources": {}}, None),
        ([{"CPU": 2, "GPU": 1}], Wanted(), {"num_gpus": 1, "resources": {}}, None),
        ([{"CPU": 2, "GPU": 1}], Wanted(gpus=0), {"num_gpus": 0, "resources": {}}, None),
        ([{"CPU": 2, "GPU": 1}], Wanted(gpus=0.5), {"num_gpus": 0.5, "resources": {}}, None),
        (WARD, Wanted(), {"num_gpus": 1, "resources": {"target": 1}}, {"shard": 1}),
        (WARD, Wanted(resource="shard"), {"num_gpus": 0, "resources": {"shard": 1}}, {"shard": 1}),
        ([{"CPU": 2, "GPU": 1}, {"CPU": 0, "target": 1}], Wanted(), {"num_gpus": 0, "resources": {"target": 1}}, None),
    ],
)
def test_the_target_goes_where_its_resource_is(nodes: Nodes, wanted: Wanted, target: Any, shard: Any) -> None:
    """A GPU elsewhere is no GPU of the target's."""
    found = wanted.place(nodes)
    assert found.target == {"num_cpus": 0, **target}
    assert (found.shard and found.shard["resources"]) == shard


@pytest.mark.parametrize(
    ("nodes", "wanted", "said"),
    [
        (LAPTOP, Wanted(gpus=1), r"target\.gpus: found 0 of the resource 'GPU' on a node; expected 1"),
        (LAPTOP, Wanted(resource="CPU"), r"target\.resource: found 'CPU', which every machine has; expected a name of your own"),
        (WARD, Wanted(resource="memory"), r"target\.resource: found 'memory'"),
        (WARD, Wanted(gpus=1.5), r"target\.gpus: found 1\.5; expected nothing, a share from 0\.0001 to 1"),
        (WARD, Wanted(hospitals=True, each=1.5), r"FEDMERGE_HOSPITAL_GPUS: found 1\.5; expected nothing, a share"),
        (WARD, Wanted(gpus=0.00005), r"target\.gpus: found 5e-05; expected nothing, a share from"),
        (WARD, Wanted(gpus=2), r"found 1 of the resource 'GPU' on the target's node \('target'\); expected 2"),
        (LAPTOP, Wanted(resource="mercy"), r"target\.resource: found 0 of the resource 'mercy' on a node; expected 1"),
        (WARD, Wanted(shards=4), r"target\.shards: found 3 of the resource 'shard' on all nodes together; expected 4"),
        (LAPTOP, Wanted(hospitals=True, each=0.5), r"FEDMERGE_HOSPITAL_GPUS: found 0 of the resource 'GPU'.*; expected 0\.5"),
        ([{"CPU": 0, "target": 1}], Wanted(hospitals=True), r"sites: found 0 of the resource 'CPU' on a node; expected 1"),
    ],
)
def test_a_placement_that_cannot_be_met_names_resource_wanted_and_available(nodes: Nodes, wanted: Wanted, said: str) -> None:
    with pytest.raises(ScenarioError, match=said):
        wanted.place(nodes)


def test_once_placed_nothing_else_will_do() -> None:
    wanted = Wanted().at(Wanted().place(WARD))
    with pytest.raises(ScenarioError, match="'target'"):
        wanted.place([WARD[0], WARD[2]])


def test_an_address_where_nobody_answers_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(ScenarioError, match=r"RAY_ADDRESS: found '127.*nobody answers.*HOST:PORT of the head"):
            preflight(Wanted())


ODD = [
    "auto",
    "local",
    "ray://x:1",
    "127.0.0.1",
    ":6379",
    "host:port",
    " ",
    "127.0.0.1: 6379",
    "127.0.0.1:²",
    "::1:1",
    "[x:6379",
    "[::1]x:6379",
]


@pytest.mark.parametrize("given", ODD)
def test_an_address_is_host_and_port(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would look for minutes, and for `auto` find the Ray of another run."""
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(ScenarioError, match=r"RAY_ADDRESS: found '.*'; expected HOST:PORT of the head of a Ray cluster"):
        preflight(Wanted())


@pytest.mark.parametrize("port", ["0", "65536", "99999", "1" * 5000])
def test_a_number_that_is_no_port_is_called_so(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ScenarioError, match=rf"{port} is no port; expected HOST:PORT of .* port from 1 to 65535"):
        preflight(Wanted())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_blanks_around_an_address_are_no_part_of_it(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET6 if host[0] == "[" else socket.AF_INET) as nobody:
        nobody.bind((host.strip("[]"), 0))
        monkeypatch.setenv("RAY_ADDRESS", f" {host}:{nobody.getsockname()[1]} ")
        with pytest.raises(ScenarioError, match="where nobody answers"):
            preflight(Wanted())


def test_an_empty_address_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one, a head that nobody has started would be asked for."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "")
    preflight(Wanted())
    assert not ray.is_initialized()


def test_a_host_that_can_be_none_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "host..x:6379")
    with pytest.raises(ScenarioError, match=r"RAY_ADDRESS: found 'host\.\.x:6379', where nobody answers \(no such name\)"):
        preflight(Wanted())


@pytest.mark.slow
def test_a_cluster_that_does_not_let_us_in_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the front door, since it is Ray that refuses: it is told of a token that is nowhere."""
    world(tmp_path / "here")
    monkeypatch.setenv("RAY_ADDRESS", ray_address())  # starts before there is talk of a token
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    ended = command(tmp_path / "here", "--experts-only", "--backend", "simulation")
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    assert "RAY_AUTH_TOKEN_PATH is set but file cannot be opened" in ended.stderr
    assert "expected a cluster that lets this command in. Where its nodes have a token" in ended.stderr


@pytest.mark.parametrize("given", ["half", "-1", "nan", "inf"])
def test_a_share_of_a_gpu_is_a_number(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMERGE_HOSPITAL_GPUS", given)
    with pytest.raises(ScenarioError, match=f"FEDMERGE_HOSPITAL_GPUS: found '{given}'"):
        preflight(Wanted())


@pytest.mark.slow
@pytest.mark.long
def test_on_a_cluster_the_target_is_on_its_own_machine_and_outlives_it(target: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hospitals' CPUs on one node; the target on another, then, as that is lost, on a third."""
    import ray
    from ray.cluster_utils import Cluster

    task = target("mean", "expert", "eam")
    wanted = TargetSite(spread(task, 1), experts(), base()).advance(5)
    for name, value in {"period_ms": 500, "initial_delay_ms": 0, "failure_threshold": 4, "timeout_ms": 2000}.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))  # a lost node is noticed sooner than after half a minute
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        wards = [cluster.add_node(num_cpus=0, resources={"target": 1}) for _ in range(2)]
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        monkeypatch.setattr(actor, "LOST_S", 2.0)
        with RemoteTarget(spread(task, 2), experts(), base(), 120, restarts=5) as there:
            homes = {node["NodeID"] for node in ray.nodes() if node["Resources"].get("target")}
            first = wait(there._actor.node.remote(), "its node", 60)
            found = there.advance(2)
            (lost,) = [ward for ward in wards if ward.node_id == first]
            cluster.remove_node(lost, allow_graceful=False)
            found += there.advance(3)
            alike(wanted, found)
            assert len(there.revival.deaths) >= 1
            assert {first, wait(there._actor.node.remote(), "its node", 60)} == homes
    finally:
        cluster.shutdown()
