"""One round, in which hospitals also say how much each parameter matters to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.experts.statistic import STATISTICS, Statistic
from fedmerge.experts.strategy import ALL_OF_THEM, Strategy
from fedmerge.merge.fisher_information import Estimator

STEPS, RATE, FADE, FADE_OF_SQUARES, FLOOR = 2000, 0.01, 0.9, 0.99, 0.01
"""The descent of the authors' code: steps, eta, decay of m and of s, and what is added to sqrt(s)."""

UNSEEN = 1e-6
"""Sum of Fisher information below which the closed form takes the mean, as the authors' code does."""


class FedFisher(Strategy):
    """min over theta of sum_k p_k (theta - theta_k)^T F_k (theta - theta_k), F_k the diagonal Fisher information at the hospital.

    descent: from the mean, v = (sum p_k F_k) theta - sum p_k F_k theta_k; m <- v + 0.9 m; s <- v^2 + 0.99 s;
    theta <- theta - 0.01 m / (sqrt(s) + 0.01), 2000 times. The authors keep the best of every 100 steps on validation images of the
    server, which here has none. closed: sum p_k F_k theta_k / sum p_k F_k. The paper's K-FAC variant is not here.
    Worked example: p = (1/2, 1/2), F = (3, 1), theta = (0, 4): closed gives 1.
    """

    paper: ClassVar[str] = "Jhunjhunwala et al., FedFisher: Leveraging Fisher information for one-shot learning, AISTATS 2024"

    rounds: Literal[1] = Field(1, description="one-shot")
    solve: Literal["descent", "closed"] = Field("descent", description="how the minimum is found")
    samples: int = Field(500, ge=1, description="training images of a hospital that F is computed from")
    estimator: Estimator = Field("exact", description="expectation over labels")

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """F, which doubles the upload."""
        fisher: Any = STATISTICS.load("fisher")
        return (fisher(samples=self.samples, estimator=self.estimator),)

    def server(self) -> Any:
        """Flower has none: its FedAvg with another mean."""
        from flwr.app import ArrayRecord, MetricRecord
        from flwr.serverapp.strategy import FedAvg

        solve = closed if self.solve == "closed" else descent

        class Server(FedAvg):  # type: ignore[misc]
            """Replies hold F beside the weights."""

            def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
                contents = [reply.content for reply in replies]
                n = [float(content["metrics"]["num-examples"]) for content in contents]
                theta = [content["arrays"].to_torch_state_dict() for content in contents]
                F = [content["fisher"].to_torch_state_dict() for content in contents]
                p = torch.tensor(n, dtype=torch.float64) / sum(n)
                merged = {
                    name: solve(p, [one[name] for one in F], [one[name] for one in theta])
                    if name in F[0]
                    else mean(p, [one[name] for one in theta])
                    for name in theta[0]
                }
                return ArrayRecord(merged), MetricRecord({"num-examples": sum(n)})

        return Server(**ALL_OF_THEM)


def mean(p: Tensor, theta: Sequence[Tensor]) -> Tensor:
    """sum_k p_k theta_k in float64."""
    return torch.stack([p_k * own.double() for p_k, own in zip(p, theta, strict=True)]).sum(0)


def closed(p: Tensor, F: Sequence[Tensor], theta: Sequence[Tensor]) -> Tensor:
    """sum p_k F_k theta_k / sum p_k F_k, and the mean where no hospital's predictions depend on a parameter."""
    weight = torch.stack([p_k * one.double() for p_k, one in zip(p, F, strict=True)])
    total = weight.sum(0)
    found = (weight * torch.stack([own.double() for own in theta])).sum(0) / total.clamp(min=UNSEEN)
    return torch.where(total < UNSEEN, mean(p, theta), found)


def descent(p: Tensor, F: Sequence[Tensor], theta: Sequence[Tensor], steps: int = STEPS) -> Tensor:
    """From the mean, so many steps."""
    weight = torch.stack([p_k * one.double() for p_k, one in zip(p, F, strict=True)])
    A, b = weight.sum(0), (weight * torch.stack([own.double() for own in theta])).sum(0)
    found = mean(p, theta)
    m, s = torch.zeros_like(found), torch.zeros_like(found)
    for _ in range(steps):
        v = A * found - b
        m, s = v + FADE * m, v**2 + FADE_OF_SQUARES * s
        found = found - RATE * m / (s.sqrt() + FLOOR)
    return found
