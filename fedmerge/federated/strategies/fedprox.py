"""FedAvg with hospitals that are held back from going far from the global model."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from fedmerge.federated.strategies._base import ALL_OF_THEM, Strategy


class FedProx(Strategy):
    """Local loss + (mu/2) ||theta - theta^r||^2; the mean as in FedAvg. mu = 0 is FedAvg, to the bit."""

    paper: ClassVar[str] = "Li et al., Federated optimization in heterogeneous networks, MLSys 2020"

    mu: float = Field(0.01, ge=0, description="strength of the proximal term")

    @property
    def proximal(self) -> float:
        """mu."""
        return self.mu

    def server(self) -> Any:
        """Flower's own; the hospitals add the term, with its square, which the example in Flower's docstring lacks."""
        from flwr.serverapp.strategy import FedProx as Server

        return Server(proximal_mu=self.mu, **ALL_OF_THEM)
