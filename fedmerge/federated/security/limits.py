"""What weights may be so that they can come from honest training that began at theta_0."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.registry import Spec

State = Mapping[str, Tensor]


class Limits(Spec):
    """Bounds that no honest training comes near; what they keep out is broken or wants to do harm.

    tau = theta - theta_0. Matrices: the encoder's arrays of two dimensions and more; norms and biases start alike everywhere.
    """

    growth: float = Field(
        30,
        gt=1,
        description="largest root mean square of an array, as a multiple of theta_0's: of the same array or of all "
        "arrays, whichever is larger",
    )
    drift: float = Field(5, gt=0, description="largest |tau| of the encoder, as a multiple of |theta_0|")
    kinship: float = Field(0.1, ge=-1, lt=1, description="least cosine between the encoder's matrices and those of theta_0")

    def complaint(self, weights: State, theta_0: State, heads: Sequence[str]) -> str:
        """Why these weights, finite and of theta_0's layout, cannot be admitted, or nothing. heads: names of the classifier's."""
        return next(self._complaints(weights, theta_0, set(heads)), "")

    def _complaints(self, weights: State, theta_0: State, heads: set[str]) -> Iterator[str]:
        whole = rms(theta_0[name] for name in theta_0 if theta_0[name].is_floating_point())
        for name, tensor in weights.items():
            if not tensor.is_floating_point():
                if not torch.equal(tensor, theta_0[name]):
                    yield f"{name}: found other integers than theta_0's; expected them untouched: nothing trains them"
                continue
            most = self.growth * max(rms([theta_0[name]]), whole)
            if (found := rms([tensor])) > most:
                yield f"{name}: found root mean square {found:.3g}; expected at most {most:.3g}, {self.growth:g} times theta_0's"
        drifted, kin = measured(weights, theta_0, heads)
        if drifted > self.drift:
            yield f"weights: found them {drifted:.3g} norms of theta_0 away from it; expected at most {self.drift:g}"
        if kin < self.kinship:
            expected = f"at least {self.kinship:g}: these were trained from another initialization"
            yield f"weights: found a cosine of {kin:.3g} with theta_0; expected {expected}"


DEFAULT = Limits()


def measured(weights: State, theta_0: State, heads: set[str]) -> tuple[float, float]:
    """|tau| / |theta_0| of the encoder, and the cosine of its matrices with theta_0's; 0 and 1 where nothing can be measured."""
    encoder = [name for name in weights if name not in heads and weights[name].is_floating_point()]
    tau = norm(weights[name].double() - theta_0[name].double() for name in encoder)
    start = norm(theta_0[name] for name in encoder)
    matrices = [name for name in encoder if weights[name].ndim > 1]
    dot = sum(float((weights[name].double() * theta_0[name].double()).sum()) for name in matrices)
    length = norm(weights[name] for name in matrices) * norm(theta_0[name] for name in matrices)
    return (tau / start if start else 0.0), (dot / length if length else 1.0)


def norm(tensors: Iterator[Tensor]) -> float:
    """Euclidean norm over all, in float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def rms(tensors: Iterator[Tensor] | Sequence[Tensor]) -> float:
    """Root mean square over all numbers, in float64."""
    squares, count = 0.0, 0
    for tensor in tensors:
        squares, count = squares + float(tensor.double().square().sum()), count + tensor.numel()
    return math.sqrt(squares / count) if count else 0.0
