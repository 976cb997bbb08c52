"""A target of the phantom with random experts: nobody has to train for these tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedmerge.adaptation.tasks import Arrays, Contribution, TargetTask
from fedmerge.data.datasets.organ_phantom import ORGANS
from fedmerge.federated.model import ModelSpec, build
from fedmerge.federated.site import Site
from fedmerge.merging.methods._base import load_method
from fedmerge.stream.schedules._base import SCHEDULES
from tests.conftest import TINY

MODEL = ModelSpec.model_validate(TINY)
NAMES = ("north", "south", "west")


def experts(seed: int = 0) -> list[Contribution]:
    """Three experts about one initialization."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Contribution(
            site=name,
            weights={key: value + 0.1 * torch.randn(value.shape, generator=generator).numpy() for key, value in base().items()},
            n=30 + 10 * number,
            temperature=1.0 + 0.2 * number,
        )
        for number, name in enumerate(NAMES)
    ]


def base() -> Arrays:
    """theta_0."""
    return {name: tensor.numpy() for name, tensor in build(MODEL, len(ORGANS), seed=0).state_dict().items()}


@pytest.fixture
def target() -> Callable[..., TargetTask]:
    def make(*methods: Any, images: int = 96, source: dict[str, Any] | None = None) -> TargetTask:
        source = source or {"kind": "organ_phantom", "images": images, "patients": 12}
        entries = methods or ("mean", "weighted_mean", "expert", "ensemble", "dcs", "eam")
        return TargetTask(
            site=Site.model_validate({"name": "mercy", "source": source, "samples": 2}),
            model=MODEL,
            classes=ORGANS,
            schedule=SCHEDULES.load("mixture_drift")(batch_size=8),
            methods=tuple(load_method(entry) if isinstance(entry, str) else entry for entry in entries),
            seed=0,
            threads=1,
        )

    return make
