"""Checks of uploaded experts that need no labels. A kind is one file in `federated/defenses/`, named in a scenario's `defenses`.

Each one compares an expert with the others, never with the truth, and only by a wide margin: an honest hospital may differ.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmerge.federated.pool.experts import Expert
from fedmerge.merging.bank.layout import Parts, StateDict
from fedmerge.merging.bank.row_storage import flatten
from fedmerge.merging.bank.stateless import Stateless
from fedmerge.registry import Folder, Plugin

FEWEST = 3
"""Experts that a comparison needs: of two that differ, nobody can tell which one is odd."""


@dataclass(frozen=True)
class Finding:
    """What a check saw of one expert. excess: above 1 is odd, and the largest is the oddest. said: the figure, and the bound."""

    site: str
    check: str
    value: float
    bound: float
    excess: float
    said: str

    @property
    def odd(self) -> bool:
        """Whether the bound is broken."""
        return not self.excess <= 1  # NaN is odd


@dataclass(frozen=True)
class Probe:
    """Public images: of no hospital, and their labels are not used. pixels: (n, H, W, C) uint8. batch: to what a model takes.

    familiar: whether they show the classes that the hospitals tell apart. On images of anything else, honest experts have no
    reason to say the same.
    """

    pixels: NDArray[np.uint8]
    batch: Callable[[NDArray[np.uint8]], Tensor]
    familiar: bool


@dataclass(frozen=True)
class Exhibit:
    """What the server has in hand. model: of the experts' kind, in evaluation mode. experts: those still to be compared.

    They may be more than go into memory, so everything is asked of one expert after the other: their weights lie in the pool's
    files, and what is known of one is small. on_tick: told how many times an expert has looked at the probe.
    """

    model: nn.Module
    parts: Parts
    theta_0: Tensor | None
    experts: tuple[Expert, ...]
    probe: Probe | None
    on_tick: Callable[[int], None]
    forwards: list[int] = field(default_factory=list)
    known: dict[tuple[str, Any], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        model: nn.Module, theta_0: StateDict | None, experts: Sequence[Expert], probe: Probe | None, on_tick: Callable[[int], None]
    ) -> Exhibit:
        """Before anything has been looked at."""
        parts, skeleton = Parts.of(model), copy.deepcopy(model).eval().requires_grad_(False)
        start = None if theta_0 is None else flatten(theta_0, parts, "cpu", torch.float32)
        return Exhibit(skeleton, parts, start, tuple(experts), probe, on_tick)

    @cached_property
    def call(self) -> Stateless:
        """The model as a function of its state."""
        return Stateless(self.model)

    def without(self, site: str) -> Exhibit:
        """The others."""
        return replace(self, experts=tuple(expert for expert in self.experts if expert.site != site))

    def mended(self, expert: Expert) -> Exhibit:
        """All, with one expert as it is now; what is known of it is forgotten."""
        known = {key: value for key, value in self.known.items() if key[0] != expert.site}
        return replace(self, experts=tuple(expert if one.site == expert.site else one for one in self.experts), known=known)

    @property
    def names(self) -> tuple[str, ...]:
        """The sites' names, in order."""
        return tuple(expert.site for expert in self.experts)

    @property
    def encoder(self) -> slice:
        """The encoder's columns of a task vector; the head's come after."""
        return slice(0, sum(self.model.get_parameter(name).numel() for name in self.parts.encoder))

    def taus(self) -> Iterator[Tensor]:
        """The task vector tau_k = theta_k - theta_0 (P,) of each of those still compared, in order."""
        assert self.theta_0 is not None
        for expert in self.experts:
            yield flatten(expert.weights, self.parts, "cpu", torch.float32) - self.theta_0

    @property
    def temperatures(self) -> Tensor:
        """(K,), as declared."""
        return torch.tensor([expert.temperature for expert in self.experts])

    def logits(self, view: Any = "none", changed: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None) -> Tensor:
        """Logits (K, n, C) on the probe, or on a view of it; each is computed once. view: names what `changed` does."""
        assert self.probe is not None
        batch = None
        for expert in self.experts:
            if (expert.site, view) not in self.known:
                if batch is None:
                    batch = self.probe.batch(self.probe.pixels if changed is None else changed(self.probe.pixels))
                self.known[expert.site, view] = torch.nan_to_num(self._run(expert, batch).float())
                self.forwards.append(len(batch))
                self.on_tick(len(self.forwards))
        return torch.stack([self.known[expert.site, view] for expert in self.experts])

    def _run(self, expert: Expert, batch: Tensor) -> Tensor:
        names = (*self.parts.encoder, *self.parts.head, *self.parts.beside)
        logits: Tensor = self.call({name: expert.weights[name] for name in names}, batch)
        return logits


class Defense(Plugin):
    """Base of every kind.

    at_target: it acts there, batch by batch, and judges nobody. probe: whether it needs public images; familiar: and whether
    these must show the federation's own classes. views: how many views of them it asks for beside the plain ones. from_theta_0:
    whether it looks at what experts have moved from there.
    """

    at_target: ClassVar[bool] = False
    probe: ClassVar[bool] = False
    familiar: ClassVar[bool] = False
    views: ClassVar[int] = 0
    from_theta_0: ClassVar[bool] = False

    @abstractmethod
    def judge(self, exhibit: Exhibit) -> list[Finding]:
        """One finding for each expert."""

    def repair(self, exhibit: Exhibit, site: str) -> Expert | None:
        """The expert as it can be used after all; None leaves it out."""
        return None


DEFENSES: Folder[Defense] = Folder("fedmerge.federated.defenses", Defense, "defense")  # type: ignore[type-abstract]
