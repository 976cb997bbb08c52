"""What a server pushes into a grid, and whom it waits for. That it asks lost nodes again, real Flower shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from fedmerge.federated.flower.coordinator import Coordinator, GridBackend
from fedmerge.federated.messages import Job, Request, SiteTask
from fedmerge.federated.server.authentication import introduced

TURN_S = 0.3
"""Nodes that share a machine say one after the other who they are."""


class Turns:
    """A grid of one node for each site. Every question who a node is takes a turn; what is asked after that has no answer."""

    def __init__(self, tasks: Iterable[SiteTask]) -> None:
        self.sites = [task.site for task in tasks]
        self.messages: list[Any] = []
        self.asked: list[Any] = []

    def get_node_ids(self) -> list[int]:
        return list(range(len(self.sites)))

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        for message in messages:
            self.messages.append(message)
            message.metadata.__dict__["_message_id"] = str(len(self.messages))
            if message.metadata.message_type == "query":
                self.asked.append(message)
        return [str(len(self.messages))]

    def pull_messages(self, numbers: Iterable[str]) -> list[Any]:
        from flwr.app import ConfigRecord, Message, RecordDict

        if not self.asked:
            return []
        time.sleep(TURN_S)
        message = self.asked.pop(0)
        if message.metadata.message_id not in numbers:
            return []
        site = self.sites[message.metadata.dst_node_id]
        said = introduced(site, str(message.content["ask"]["nonce"]))
        reply = Message(RecordDict({"said": ConfigRecord(said)}), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
        return [reply]


@pytest.fixture(autouse=True)
def _server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower tells a server's process of itself."""
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(f"flwr.supercore.task_identity.TaskIdentity._{name}", 1)


def test_sites_that_start_from_the_same_weights_share_one_copy(hospital: Callable[..., SiteTask], job: Callable[..., Job]) -> None:
    """A model of 350 MB is held once, however many hospitals are asked; weights of a site's own are its own."""
    tasks = [hospital(name) for name in ("north", "south", "west")]
    asked, grid = job(*tasks), Turns(tasks)
    weights = asked.initial.weights
    others = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    requests = [Request("train", task, given) for task, given in zip(tasks, (weights, weights, others), strict=True)]
    coordinator = Coordinator(grid, asked, list, 0.0, 0, whose={"north": 0, "south": 1, "west": 2})
    assert not list(coordinator.ask(requests, 0.0))
    north, south, west = (message.content["weights"] for message in grid.messages)
    assert north is south is not west
    for record, given in ((north, weights), (west, others)):
        arrived = record.to_torch_state_dict()
        assert all(torch.equal(arrived[name], tensor) for name, tensor in given.items())


def test_nodes_that_take_turns_are_waited_for_while_they_answer(hospital: Callable[..., SiteTask], job: Callable[..., Job]) -> None:
    """All of a thousand simulated hospitals need longer to say who they are than one may take."""
    tasks = [hospital(name) for name in ("north", "south", "west")]
    outcomes = GridBackend(Turns(tasks), 2 * TURN_S, "listed").gather(job(*tasks, deadline_s=0.1), lambda _: None)
    assert {outcome.reason for outcome in outcomes.values()} == {"did not answer within 0.1 s"}
