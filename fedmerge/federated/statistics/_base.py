"""The kinds of statistics that a scenario may ask of its sites beside weights. A kind is one file in `federated/statistics/`."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedmerge.data.images import Normalized
from fedmerge.registry import Folder, Plugin

VERSION = 1
"""Raise it whenever the same statistic would be computed otherwise."""

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Ground:
    """What a site computes a statistic from, all of it its own.

    model: in evaluation mode, with the site's expert or with what the server sent. x: training images (N, channels, H, W),
    normalized, as a tensor or made batch by batch, on the model's device. y: their labels (N,). runs: the states of all its runs;
    it may have to train them again. layers: for statistics in rounds, the linear weights that this round asks for. seed: of the
    site, for draws. theta_0: its state, where `model` has the expert.
    """

    model: nn.Module
    x: Tensor | Normalized
    y: Tensor
    runs: Callable[[], Sequence[State]]
    layers: tuple[str, ...]
    seed: int
    theta_0: State | None = None

    def draw(self, count: int) -> Tensor | Normalized:
        """`count` training images, or all if there are fewer, the same at every call."""
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.seed))
        chosen = order[:count].sort().values
        return self.x.chosen(chosen) if isinstance(self.x, Normalized) else self.x[chosen]


class Statistic(Plugin):
    """Base of every kind. Its fields say how it is computed, and are part of the key under which it is kept."""

    starts_from: ClassVar[Literal["expert", "theta_0", "rounds"]] = "expert"
    """What a site needs that is asked for it alone: its expert, theta_0, or a new message for each block of layers."""

    needs_theta_0: ClassVar[bool] = False
    """Whether it is measured by theta_0, so that all must know it."""

    for_experts: ClassVar[bool] = True
    """Whether a scenario may ask for it beside experts. Others are for strategies alone, which ask for them in their rounds."""

    is_state: ClassVar[bool] = False
    """Whether its arrays are weights of the model, which the limits of experts hold for too."""

    @abstractmethod
    def layout(self, model: nn.Module) -> Shapes:
        """The arrays that a site may send, by name and shape; all are float32."""

    @abstractmethod
    def measure(self, ground: Ground) -> State:
        """The arrays, on the CPU."""

    def unfit(self, model: nn.Module, image: Tensor) -> str:
        """Why it cannot be measured of this model, whatever its weights, or nothing. image: one (1, channels, H, W)."""
        return ""

    @property
    def key(self) -> str:
        """Digest of the kind and its fields: what was computed otherwise is another statistic."""
        fields = json.dumps([VERSION, self.model_dump(mode="json")], sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:16]

    def refuses(self, name: str, tensor: Tensor) -> str:
        """Why an array of the right shape cannot be what it should be, or nothing."""
        return ""


STATISTICS: Folder[Statistic] = Folder("fedmerge.federated.statistics", Statistic, "statistic")  # type: ignore[type-abstract]


def shapes_of_parameters(model: nn.Module) -> Shapes:
    """Every parameter's shape."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def negativity(tensor: Tensor) -> str:
    """A complaint if a number is negative."""
    return "found a negative number; expected sums of squares" if bool((tensor < 0).any()) else ""


def asymmetry(tensor: Tensor) -> str:
    """A complaint if a matrix is not symmetric with a diagonal that is not negative."""
    if bool((tensor.diagonal() < 0).any()):
        return "found a negative element on the diagonal; expected sums of squares"
    if not torch.allclose(tensor, tensor.T, rtol=1e-4, atol=1e-6 * float(tensor.abs().max())):
        return "found a matrix that is not symmetric; expected inner products"
    return ""
