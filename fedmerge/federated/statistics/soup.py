"""The mean of all runs of a site, beside the expert that it selected."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from fedmerge.federated.statistics._base import Ground, Shapes, State, Statistic, shapes_of_parameters


class Soup(Statistic):
    """(1/M) sum_m theta_m over the site's M runs, by parameter (Rame et al., DiWA, NeurIPS 2022, eq. 2, within one site).

    Asked of a site whose expert is in the pool already, it trains the same runs once more.
    """

    starts_from: ClassVar[Literal["expert", "theta_0", "rounds"]] = "theta_0"
    is_state: ClassVar[bool] = True

    def layout(self, model: nn.Module) -> Shapes:
        """The shape of every parameter."""
        return shapes_of_parameters(model)

    def measure(self, ground: Ground) -> State:
        """The mean by parameter."""
        runs = ground.runs()
        return {name: torch.stack([run[name] for run in runs]).mean(0) for name, _ in ground.model.named_parameters()}
