"""The median of what hospitals have trained, number by number."""

from __future__ import annotations

from typing import Any, ClassVar

from fedmerge.federated.strategies._base import ALL_OF_THEM, Strategy


class FedMedian(Strategy):
    """theta^{r+1} = median_k theta_k^{r+1} of every coordinate; the number of images does not count."""

    paper: ClassVar[str] = "Yin et al., Byzantine-robust distributed learning, ICML 2018"

    def server(self) -> Any:
        """Flower's own."""
        from flwr.serverapp.strategy import FedMedian as Server

        return Server(**ALL_OF_THEM)
