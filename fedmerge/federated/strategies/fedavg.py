"""The mean of what hospitals have trained, by their number of images, as often as there are rounds."""

from __future__ import annotations

from typing import Any, ClassVar

from fedmerge.federated.strategies._base import ALL_OF_THEM, Strategy


class FedAvg(Strategy):
    """theta^{r+1} = sum_k (n_k/n) theta_k^{r+1}, each trained from theta^r.

    Worked example: two hospitals with 1 and 3 images that end at 0 and 4 give 3.
    """

    paper: ClassVar[str] = "McMahan et al., Communication-efficient learning of deep networks, AISTATS 2017"

    def server(self) -> Any:
        """Flower's own."""
        from flwr.serverapp.strategy import FedAvg as Server

        return Server(**ALL_OF_THEM)
