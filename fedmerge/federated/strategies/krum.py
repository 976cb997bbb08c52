"""Of what hospitals have trained, the one that is nearest to the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmerge.federated.strategies._base import ALL_OF_THEM, Strategy


class Krum(Strategy):
    """theta^{r+1} = theta_k of the least sum of squared distances to its K - f - 2 nearest others.

    Flower takes ||a||^2 + ||b||^2 - 2 a.b in float32, of which nothing is left where a round moves weights by a thousandth; here
    distances are of differences, in float64.
    """

    paper: ClassVar[str] = "Blanchard et al., Machine learning with adversaries, NeurIPS 2017"

    malicious: int = Field(0, strict=True, ge=0, description="f, number of hospitals that may cheat; K - f - 2 must be at least 1")

    @property
    def least(self) -> int:
        """f + 3."""
        return self.malicious + 3

    def server(self) -> Any:
        """Flower's own, with distances of ours."""
        from flwr.app import MetricRecord
        from flwr.serverapp.strategy import Krum as Server

        malicious = self.malicious

        class Nearest(Server):  # type: ignore[misc]
            """The reply that is nearest to the others."""

            def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
                valid, _ = self._check_and_log_replies(replies, is_train=True)
                sent = [next(iter(reply.content.array_records.values())) for reply in valid]
                states = [{name: array.numpy() for name, array in arrays.items()} for arrays in sent]
                return sent[most_central(squared_distances(states), malicious)], MetricRecord({})

        return Nearest(num_malicious_nodes=malicious, **ALL_OF_THEM)


def squared_distances(states: Sequence[Mapping[str, NDArray[Any]]]) -> NDArray[np.float64]:
    """||theta_i - theta_j||^2 (K, K), over all arrays."""
    found = np.zeros((len(states), len(states)))
    for i, one in enumerate(states):
        for j, other in enumerate(states[:i]):
            apart = (np.subtract(one[name], other[name], dtype=np.float64).ravel() for name in one)
            found[i, j] = found[j, i] = sum(float(part @ part) for part in apart)
    return found


def most_central(distances: NDArray[np.float64], malicious: int) -> int:
    """argmin_k of the sum of the K - f - 2 least distances (K, K) to others; the first of equals."""
    count = max(1, len(distances) - malicious - 2)
    others = distances + np.diag(np.full(len(distances), np.inf))
    return int(np.sort(others, 1)[:, :count].sum(1).argmin())
