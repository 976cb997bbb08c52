"""One round, in which hospitals also say how much each parameter matters to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from fedmerge.federated.statistics._base import STATISTICS, State, Statistic
from fedmerge.federated.strategies._base import ALL_OF_THEM, Strategy
from fedmerge.merging.curvature.fisher import Estimator
from fedmerge.merging.curvature.kfac import GRADIENTS, INPUTS, joined, product

STEPS, RATE, FADE, FADE_OF_SQUARES, FLOOR = 2000, 0.01, 0.9, 0.99, 0.01
"""The descent of the authors' code: steps, eta, decay of m and of s, and what is added to sqrt(s), or for K-FAC to s."""

UNSEEN = 1e-6
"""Sum of Fisher information below which the closed form takes the mean, as the authors' code does."""


class FedFisher(Strategy):
    """min over theta of sum_k p_k (theta - theta_k)^T F_k (theta - theta_k), F_k the Fisher information at the hospital.

    information: F_k is its diagonal, or, by kfac, A (x) G for each linear layer (`curvature/kfac.py`) and the diagonal elsewhere.
    descent: from the mean, v = sum p_k F_k (theta - theta_k); m <- v + 0.9 m; s <- v^2 + 0.99 s; 2000 times
    theta <- theta - 0.01 m / (sqrt(s) + 0.01), for kfac theta - 0.01 m / sqrt(s + 0.01). The authors keep the best of every 100
    steps on validation images of the server, which here has none. closed, of the diagonal alone: sum p_k F_k theta_k / sum p_k F_k.
    The authors' K-FAC fits into the bytes of one model: weights of 16 bits, factors of low rank and 8 bits. Here all is float32 and
    whole, as the audit has it: d^2 + o^2 numbers for a layer of d inputs and o outputs, beside its d o weights.
    Worked example: p = (1/2, 1/2), F = (3, 1), theta = (0, 4): closed gives 1.
    """

    paper: ClassVar[str] = "Jhunjhunwala et al., FedFisher: Leveraging Fisher information for one-shot learning, AISTATS 2024"

    rounds: int = Field(1, strict=True, ge=1, le=1, description="number of rounds; always 1")
    information: Literal["diagonal", "kfac"] = Field("diagonal", description="approximation of the Fisher information F")
    solve: Literal["descent", "closed"] = Field("descent", description="how the minimum is found; with kfac only descent")
    samples: int = Field(500, strict=True, ge=1, description="number of a hospital's training images from which F is computed")
    estimator: Estimator = Field("exact", description="how the expectation over labels is taken; with kfac exact or mc")

    @field_validator("solve", "estimator")
    @classmethod
    def _can_be(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("information") == "kfac" and value == "closed":
            raise ValueError("with information: kfac there is no closed form: expected descent")
        if info.data.get("information") == "kfac" and value == "fb_compat":
            raise ValueError("fb_compat is a way to the diagonal; with information: kfac, expected exact or mc")
        return value

    @property
    def key(self) -> str:
        """Two rows may stand in one table."""
        return self.label or (f"{self.kind()}-kfac" if self.information == "kfac" else super().key)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """F: the diagonal doubles the upload."""
        kind: Any = STATISTICS.load("kfac" if self.information == "kfac" else "fisher")
        return (kind(samples=self.samples, estimator=self.estimator),)

    def server(self) -> Any:
        """Flower has none: its FedAvg with another mean."""
        from flwr.app import ArrayRecord, MetricRecord
        from flwr.serverapp.strategy import FedAvg

        solve, (statistic,) = closed_form if self.solve == "closed" else descent, self.statistics

        class Server(FedAvg):  # type: ignore[misc]
            """Replies hold F beside the weights."""

            def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
                contents = [reply.content for reply in replies]
                n = [float(content["metrics"]["num-examples"]) for content in contents]
                theta = [content["arrays"].to_torch_state_dict() for content in contents]
                F = [content[statistic.kind()].to_torch_state_dict() for content in contents]
                p = torch.tensor(n, dtype=torch.float64) / sum(n)
                merged = {
                    name: solve(p, [one[name] for one in F], [one[name] for one in theta])
                    if name in F[0]
                    else mean(p, [one[name] for one in theta])
                    for name in theta[0]
                }
                for name in (factor.removesuffix(INPUTS) for factor in F[0] if factor.endswith(INPUTS)):
                    merged |= by_layer(name, p, F, theta)
                return ArrayRecord(merged), MetricRecord({"num-examples": sum(n)})

        return Server(**ALL_OF_THEM)


def mean(p: Tensor, theta: Sequence[Tensor]) -> Tensor:
    """sum_k p_k theta_k in float64."""
    return torch.stack([p_k * own.double() for p_k, own in zip(p, theta, strict=True)]).sum(0)


def closed_form(p: Tensor, F: Sequence[Tensor], theta: Sequence[Tensor]) -> Tensor:
    """sum p_k F_k theta_k / sum p_k F_k, and the mean where no hospital's predictions depend on a parameter."""
    weight = torch.stack([p_k * one.double() for p_k, one in zip(p, F, strict=True)])
    total = weight.sum(0)
    found = (weight * torch.stack([own.double() for own in theta])).sum(0) / total.clamp(min=UNSEEN)
    return torch.where(total < UNSEEN, mean(p, theta), found)


def descent(p: Tensor, F: Sequence[Tensor], theta: Sequence[Tensor], steps: int = STEPS) -> Tensor:
    """From the mean, so many steps."""
    weight = torch.stack([p_k * one.double() for p_k, one in zip(p, F, strict=True)])
    A, b = weight.sum(0), (weight * torch.stack([own.double() for own in theta])).sum(0)
    return descend(lambda found: A * found - b, mean(p, theta), steps, lambda s: s.sqrt() + FLOOR)


def by_layer(name: str, p: Tensor, F: Sequence[State], theta: Sequence[State], steps: int = STEPS) -> State:
    """The weight of that name, and its bias if F has it, where F_k = A_k (x) G_k: so many steps from the mean."""
    A = torch.stack([one[name + INPUTS].double() for one in F])
    G = torch.stack([p_k * one[name + GRADIENTS].double() for p_k, one in zip(p, F, strict=True)])
    shape, bias = theta[0][name].shape, name.removesuffix("weight") + "bias"
    inputs = shape[1:].numel()
    has_bias = A.shape[-1] > inputs
    W = torch.stack([joined(one[name].double(), one[bias].double() if has_bias else None) for one in theta])
    b = product(A, G, W)
    found = descend(lambda W: product(A, G, W) - b, mean(p, list(W)), steps, lambda s: (s + FLOOR).sqrt())
    return {name: found[:, :inputs].reshape(shape)} | ({bias: found[:, inputs]} if has_bias else {})


def descend(v: Callable[[Tensor], Tensor], found: Tensor, steps: int, scale: Callable[[Tensor], Tensor]) -> Tensor:
    """So many steps of the authors' descent along the gradient v. scale: of the sum of squares s, what m is divided by."""
    m, s = torch.zeros_like(found), torch.zeros_like(found)
    for _ in range(steps):
        g = v(found)
        m, s = g + FADE * m, g**2 + FADE_OF_SQUARES * s
        found = found - RATE * m / scale(s)
    return found
