"""FedAvg for hospitals that take different numbers of steps: each one's way is divided by its length; all go the mean one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmerge.federated.strategies._base import ALL_OF_THEM, MOMENTUM, Optimizer, Strategy


class FedNova(Strategy):
    """d_k = (theta^r - theta_k) / ||a_k||_1; theta^{r+1} = theta^r - (sum_k p_k ||a_k||_1) sum_k p_k d_k, p_k = n_k/n.

    Equal steps everywhere make it FedAvg, to rounding. For Adam there is no exact a_k: the number of steps stands for it.
    Worked example: theta^r = 0, p = (1/2, 1/2), theta = (-1, -3) after 1 and 3 plain steps: d = (1, 1), 2 steps: theta = -2.
    """

    paper: ClassVar[str] = "Wang et al., Tackling the objective inconsistency problem, NeurIPS 2020"

    optimizer: Optimizer | None = Field("sgd", description="optimizer of the hospitals; sgd has momentum 0.9")
    lr: float | None = Field(0.02, gt=0, description="learning rate of the hospitals; null: that of the scenario's training")

    @property
    def remark(self) -> str:
        """Where it is not exact."""
        return "" if self.optimizer == "sgd" else "approximate: Adam has no exact a_k, the number of steps stands for it"

    def length(self, steps: float) -> float:
        """||a_k||_1 of a hospital's steps of a round."""
        return path_length(steps, MOMENTUM if self.optimizer == "sgd" else 0.0)

    def server(self) -> Any:
        """Flower has none: its FedAvg with another mean."""
        from flwr.app import Array, ArrayRecord, MetricRecord
        from flwr.serverapp.strategy import FedAvg

        length = self.length

        class Server(FedAvg):  # type: ignore[misc]
            """Remembers theta^r as it goes out, and takes the hospitals' ways from there."""

            def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
                self.theta = {name: array.numpy() for name, array in arrays.items()}
                out: Iterable[Any] = super().configure_train(server_round, arrays, config, grid)
                return out

            def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
                valid, _ = self._check_and_log_replies(replies, is_train=True)
                told = [next(iter(reply.content.metric_records.values())) for reply in valid]
                sent = [next(iter(reply.content.array_records.values())) for reply in valid]
                n, a = [float(one["num-examples"]) for one in told], [length(float(one["steps"])) for one in told]
                states = [{name: array.numpy() for name, array in arrays.items()} for arrays in sent]
                merged = {name: nova(before, [s[name] for s in states], n, a) for name, before in self.theta.items()}
                arrays = ArrayRecord({name: Array(value) for name, value in merged.items()})
                return arrays, MetricRecord({"num-examples": sum(n)})

        return Server(**ALL_OF_THEM)


def path_length(steps: float, rho: float) -> float:
    """||a||_1 = [tau - rho (1 - rho^tau) / (1 - rho)] / (1 - rho) of tau steps of SGD with momentum rho; rho = 0 gives tau."""
    return float((steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho))


def nova(before: NDArray[Any], theta_k: Sequence[NDArray[Any]], n: Sequence[float], a: Sequence[float]) -> NDArray[np.float64]:
    """One array of theta^{r+1}, in float64, from theta^r, the hospitals' arrays, their images, and the lengths of their ways."""
    p = np.array(n) / sum(n)
    moved = [(p_k, own, a_k) for p_k, own, a_k in zip(p, theta_k, a, strict=True) if a_k > 0]  # no step is no way
    d = sum((p_k * (np.float64(before) - own) / a_k for p_k, own, a_k in moved), np.zeros(before.shape))
    return np.asarray(before - float(p @ np.array(a)) * d, np.float64)
