"""The diagonal of the Fisher information of the expert on its site's training images: as many numbers as parameters."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from fedmerge.federated.statistics._base import Ground, Shapes, State, Statistic, negativity, shapes_of_parameters
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.curvature.fisher import Estimator, diagonal


class FisherInformation(Statistic):
    """F (P,), as `curvature.fisher.diagonal` has it (Matena & Raffel, NeurIPS 2022, eq. 2), by parameter."""

    samples: int = Field(500, ge=1, description="number of training images from which it is computed")
    estimator: Estimator = Field(
        "exact", description="how the expectation over labels is taken: exactly, by one drawn label, or as in FusionBench"
    )

    def layout(self, model: nn.Module) -> Shapes:
        """The shape of every parameter."""
        return shapes_of_parameters(model)

    def measure(self, ground: Ground) -> State:
        """F by parameter, not negative."""
        bank = Bank.of(ground.model, [ground.model.state_dict()], device=next(ground.model.parameters()).device)
        F = diagonal(bank.forward_of(0), bank.theta[0], ground.draw(self.samples), self.estimator, ground.seed)
        return {name: F[columns].reshape(bank.shapes[name]).float().cpu().clone() for name, columns in bank.slices.items()}

    def refuses(self, name: str, tensor: Tensor) -> str:
        """Squares are not negative."""
        return negativity(tensor)
