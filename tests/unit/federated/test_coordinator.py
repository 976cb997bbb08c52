"""What a server pushes into a grid. How it asks nodes that are lost, real Flower shows (tests/integration/test_flower.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from fedmerge.federated.flower.coordinator import Coordinator
from fedmerge.federated.messages import Job, Request, SiteTask


class Kept:
    """A grid whose nodes never answer."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        self.messages += messages
        return [str(len(self.messages))]


def test_sites_that_start_from_the_same_weights_share_one_copy(
    hospital: Callable[..., SiteTask], job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 350 MB is held once, however many hospitals are asked; weights of a site's own are its own."""
    for name in ("task_id", "run_id", "node_id"):  # as Flower says it to a server's process
        monkeypatch.setattr(f"flwr.supercore.task_identity.TaskIdentity._{name}", 1)
    tasks, grid = [hospital(name) for name in ("north", "south", "west")], Kept()
    asked = job(*tasks)
    weights = asked.initial.weights
    others = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    requests = [Request("train", task, given) for task, given in zip(tasks, (weights, weights, others), strict=True)]
    coordinator = Coordinator(grid, asked, list, 0.0, 0, whose={"north": 1, "south": 2, "west": 3})
    assert not list(coordinator.ask(requests, 0.0))
    north, south, west = (message.content["weights"] for message in grid.messages)
    assert north is south is not west
    for record, given in ((north, weights), (west, others)):
        arrived = record.to_torch_state_dict()
        assert all(torch.equal(arrived[name], tensor) for name, tensor in given.items())
