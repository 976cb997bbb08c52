"""Where a hospital's images lie in the embedding that all hospitals share: that of theta_0's encoder."""

from __future__ import annotations

import copy
import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmerge.data.images import at_a_time
from fedmerge.federated.statistics._base import Ground, Shapes, State, Statistic
from fedmerge.merging.scoring.features import center_of, width_of


class Centroid(Statistic):
    """phi (D,), the mean of the images' embeddings of length 1, scaled to length 1 (Bertolissi et al., COLM 2025, section 3).

    An embedding is what theta_0's head is given of a training image. It tells what a hospital's images look like on average.
    """

    starts_from: ClassVar[Literal["expert", "theta_0", "rounds"]] = "theta_0"
    needs_theta_0: ClassVar[bool] = True

    samples: int = Field(1600, ge=1, description="number of training images from which it is computed")

    def layout(self, model: nn.Module) -> Shapes:
        """As many numbers as the head is given."""
        return {"centroid": (width_of(model),)}

    def measure(self, ground: Ground) -> State:
        """phi."""
        model = ground.model
        if ground.theta_0:
            model = copy.deepcopy(model)
            model.load_state_dict(ground.theta_0)
        x = ground.draw(self.samples)
        return {"centroid": center_of(model.eval(), tuple(x.split(at_a_time(x, 128)))).float().cpu()}

    def refuses(self, name: str, tensor: Tensor) -> str:
        """A vector of length 1."""
        length = float(torch.linalg.vector_norm(tensor.double()))
        return "" if math.isclose(length, 1, abs_tol=1e-3) else f"found a vector of length {length:.3g}; expected 1"
