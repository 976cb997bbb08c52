"""Small worlds for tests: tiny models, phantom hospitals of a few patients, no downloads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest_plugins = ["tests.banks", "tests.front_door", "tests.hospitals", "tests.targets"]
settings.register_profile("house", deadline=None, derandomize=True)  # the same examples everywhere; a busy machine is no failure
settings.load_profile("house")

TINY = {
    "name": "vit_tiny_patch16_224",
    "kwargs": {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1},
}


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache; one thread, so that tests beside each other do not fight."""
    os.environ["FEDMERGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    root = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    torch.set_num_threads(1)
    yield


class Net(nn.Module):
    """A small classifier with every kind of tensor: convolution, BatchNorm, a table, a bare parameter, a head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.arange(4))
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x))) * self.scale[:, None, None]
        return self.head(x.mean((2, 3))[:, self.table])


def expert_states(count: int, seed: int = 0, classes: int = 3, spread: float = 0.5) -> list[dict[str, Tensor]]:
    """State dicts of `Net` around one random initialization, with different BatchNorm statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = Net(classes).state_dict()
    states = []
    for _ in range(count):
        state = {}
        for name, tensor in base.items():
            noise = spread * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else 0
            state[name] = (tensor + noise).abs() + 0.1 if name.endswith("running_var") else tensor + noise
        states.append(state)
    return states
