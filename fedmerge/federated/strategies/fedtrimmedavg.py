"""The mean of what hospitals have trained without the smallest and the largest, number by number."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from fedmerge.federated.strategies._base import ALL_OF_THEM, Strategy


class FedTrimmedAvg(Strategy):
    """The mean of every coordinate without its int(beta K) smallest and as many largest values."""

    paper: ClassVar[str] = "Yin et al., Byzantine-robust distributed learning, ICML 2018"

    beta: float = Field(0.34, ge=0, lt=0.5, description="share of the values cut off at each end; 0.34 cuts one of three")

    def server(self) -> Any:
        """Flower's own."""
        from flwr.serverapp.strategy import FedTrimmedAvg as Server

        return Server(beta=self.beta, **ALL_OF_THEM)
