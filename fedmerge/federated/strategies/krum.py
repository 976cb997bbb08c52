"""Of what hospitals have trained, the one that is nearest to the others."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from fedmerge.federated.strategies._base import ALL_OF_THEM, Strategy


class Krum(Strategy):
    """theta^{r+1} = theta_k of the least sum of squared distances to its K - f - 2 nearest others."""

    paper: ClassVar[str] = "Blanchard et al., Machine learning with adversaries, NeurIPS 2017"

    malicious: int = Field(0, strict=True, ge=0, description="f, number of hospitals that may cheat; K - f - 2 must be at least 1")

    @property
    def least(self) -> int:
        """f + 3."""
        return self.malicious + 3

    def server(self) -> Any:
        """Flower's own."""
        from flwr.serverapp.strategy import Krum as Server

        return Server(num_malicious_nodes=self.malicious, **ALL_OF_THEM)
