"""FedAvg with momentum at the server."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from fedmerge.federated.strategies._base import ALL_OF_THEM, Strategy


class FedAvgM(Strategy):
    """v <- beta v + (theta^r - mean); theta^{r+1} = theta^r - eta v. beta = 0 and eta = 1 are FedAvg."""

    paper: ClassVar[str] = "Hsu et al., Measuring the effects of non-identical data distribution, 2019"

    server_lr: float = Field(1.0, gt=0, description="learning rate eta of the server")
    momentum: float = Field(0.5, ge=0, lt=1, description="momentum beta of the server")

    def server(self) -> Any:
        """Flower's own."""
        from flwr.serverapp.strategy import FedAvgM as Server

        return Server(server_learning_rate=self.server_lr, server_momentum=self.momentum, **ALL_OF_THEM)
