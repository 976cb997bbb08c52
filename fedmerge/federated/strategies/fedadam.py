"""The hospitals' mean step as a gradient for Adam at the server."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from fedmerge.federated.strategies._base import ALL_OF_THEM, Strategy


class FedAdam(Strategy):
    """delta = mean - theta^r; m and v as in Adam; theta^{r+1} = theta^r + eta_r m / (sqrt(v) + tau).

    Flower corrects for the start of m and v: in round r = 1, 2, ... eta_r = eta sqrt(1 - beta_2^{r+1}) / (1 - beta_1^{r+1}).
    """

    paper: ClassVar[str] = "Reddi et al., Adaptive federated optimization, ICLR 2021"

    server_lr: float = Field(0.01, gt=0, description="learning rate eta of the server")
    beta_1: float = Field(0.9, ge=0, lt=1, description="decay of the server's mean m of updates")
    beta_2: float = Field(0.99, ge=0, lt=1, description="decay of the server's mean v of squared updates")
    tau: float = Field(1e-3, gt=0, description="tau, added to the root of v; a large tau is less adaptive")

    def server(self) -> Any:
        """Flower's own."""
        from flwr.serverapp.strategy import FedAdam as Server

        return Server(eta=self.server_lr, beta_1=self.beta_1, beta_2=self.beta_2, tau=self.tau, **ALL_OF_THEM)
