"""Inner products as in `gram`, block by block: each block's inputs come through the blocks that are already merged."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmerge.federated.statistics._base import Ground, Shapes, State, Statistic, asymmetry
from fedmerge.merging.curvature.gram import grams, linear_layers


class GramRounds(Statistic):
    """G of one block in each round (Nguyen et al., RegMean++, 2025, algorithm 1).

    It depends on all experts of the scenario, so a new site means new rounds for all; `ratio` and `ridge` are how the coordinator
    merges a block before the next round, and must be those of the method.
    """

    starts_from: ClassVar[Literal["expert", "theta_0", "rounds"]] = "rounds"

    samples: int = Field(1600, ge=1, description="training images that it is computed from")
    ratio: float = Field(1.0, gt=0, le=1, description="factor of the elements of G off the diagonal")
    ridge: float = Field(1e-6, gt=0, le=1, description="share of the mean eigenvalue added to the diagonal")

    def layout(self, model: nn.Module) -> Shapes:
        """(d, d) for each linear weight."""
        return {name: (layer.in_features, layer.in_features) for name, layer in linear_layers(model).items()}

    def measure(self, ground: Ground) -> State:
        """G of the round's layers."""
        found = grams(ground.model, torch.split(ground.draw(self.samples), 128), set(ground.layers).__contains__)
        return {name: G.cpu() for name, G in found.items()}

    def refuses(self, name: str, tensor: Tensor) -> str:
        """Inner products are symmetric."""
        return asymmetry(tensor)
