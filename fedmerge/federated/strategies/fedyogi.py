"""The hospitals' mean step as a gradient for Yogi at the server."""

from __future__ import annotations

from typing import Any

from fedmerge.federated.strategies._base import ALL_OF_THEM
from fedmerge.federated.strategies.fedadam import FedAdam


class FedYogi(FedAdam):
    """FedAdam with v <- v - (1 - beta_2) delta^2 sign(v - delta^2), and no correction for its start."""

    def server(self) -> Any:
        """Flower's own."""
        from flwr.serverapp.strategy import FedYogi as Server

        return Server(eta=self.server_lr, beta_1=self.beta_1, beta_2=self.beta_2, tau=self.tau, **ALL_OF_THEM)
