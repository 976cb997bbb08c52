"""Inner products of the inputs of every linear layer of the expert, on its site's training images."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from fedmerge.data.images import at_a_time
from fedmerge.federated.statistics._base import Ground, Shapes, State, Statistic, asymmetry
from fedmerge.merging.curvature.gram import grams, linear_layers


class Gram(Statistic):
    """G = X^T X / rows, (d, d) for each linear weight (outputs, d) (Jin et al., ICLR 2023, section 3.2)."""

    samples: int = Field(1600, ge=1, description="number of training images from which it is computed")

    def layout(self, model: nn.Module) -> Shapes:
        """(d, d) for each linear weight."""
        return {name: (layer.in_features, layer.in_features) for name, layer in linear_layers(model).items()}

    def measure(self, ground: Ground) -> State:
        """G by weight: of the round's layers where there are rounds, else of all."""
        only = set(ground.layers).__contains__ if ground.layers else linear_layers(ground.model).__contains__
        x = ground.draw(self.samples)
        found = grams(ground.model, x.split(at_a_time(x, 128)), only)
        return {name: G.cpu() for name, G in found.items()}

    def refuses(self, name: str, tensor: Tensor) -> str:
        """Inner products are symmetric."""
        return asymmetry(tensor)
