"""The Fisher information of what a site has trained, as Kronecker products: two small matrices for each linear layer."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from fedmerge.federated.statistics._base import Ground, Shapes, State, Statistic, asymmetry, negativity
from fedmerge.merging.curvature.kfac import GRADIENTS, INPUTS, Estimator, beside_images, factors, layers, others, rest, sides


class Kfac(Statistic):
    """A (d, d) and G (o, o) of each linear layer, its bias among the inputs, as `curvature.kfac.factors` has them (Martens &
    Grosse, ICML 2015); the diagonal of F for each parameter outside. Both whole, in float32: symmetric halves are not left out."""

    for_experts: ClassVar[bool] = False

    samples: int = Field(500, ge=1, description="number of training images from which it is computed")
    estimator: Estimator = Field("exact", description="how the expectation over labels is taken: exactly, or by one drawn label")

    def layout(self, model: nn.Module) -> Shapes:
        """(d, d) and (o, o) for each layer, and the shape of every other parameter."""
        shapes: Shapes = {name: tuple(parameter.shape) for name, parameter in others(model).items()}
        for name, layer in layers(model).items():
            d, o = sides(layer)
            shapes |= {name + INPUTS: (d, d), name + GRADIENTS: (o, o)}
        return shapes

    def unfit(self, model: nn.Module, image: Tensor) -> str:
        """A linear layer that sees no image, as in a text tower."""
        odd = beside_images(model.eval(), image)
        return f"a model whose layer '{odd}' sees no images" if odd else ""

    def measure(self, ground: Ground) -> State:
        """A and G by weight, the diagonal by parameter."""
        x = ground.draw(self.samples)
        found = rest(ground.model, x, self.estimator, ground.seed)
        for name, (A, G) in factors(ground.model, x, self.estimator, ground.seed).items():
            found |= {name + INPUTS: A, name + GRADIENTS: G}
        return {name: tensor.float().cpu() for name, tensor in found.items()}

    def refuses(self, name: str, tensor: Tensor) -> str:
        """Sums of outer products are symmetric, and squares are not negative."""
        return asymmetry(tensor) if name.endswith((INPUTS, GRADIENTS)) else negativity(tensor)
