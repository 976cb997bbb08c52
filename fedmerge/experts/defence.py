"""Checks of uploaded experts that need no labels. A kind is one file in `experts/defences/`, named in a scenario's `defences`.

Each one compares an expert with the others, never with the truth, and only by a wide margin: an honest hospital may differ.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.experts.pool import Expert
from fedmerge.folder import Folder, Plugin
from fedmerge.merge.bank import Bank
from fedmerge.merge.shelf import flatten

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
    """What the coordinator has in hand. bank: all the experts that arrived, and theta_0. experts: those still to be compared."""

    bank: Bank
    experts: tuple[Expert, ...]
    probe: Probe | None
    forwards: list[int]
    known: dict[Any, Tensor]

    @staticmethod
    def of(bank: Bank, experts: Sequence[Expert], probe: Probe | None) -> Exhibit:
        """Before anything has been looked at."""
        return Exhibit(bank, tuple(experts), probe, [], {})

    def without(self, site: str) -> Exhibit:
        """The others."""
        return replace(self, experts=tuple(expert for expert in self.experts if expert.site != site))

    def mended(self, expert: Expert) -> Exhibit:
        """All, with one expert as it is now; what is known of it is forgotten."""
        row = self.bank.names.index(expert.site)
        self.bank.rows[row] = flatten(expert.weights, self.bank.parts, self.bank.rows.device, self.bank.rows.dtype)
        known = {key: value for key, value in self.known.items() if key[0] != row}
        return replace(self, experts=tuple(expert if one.site == expert.site else one for one in self.experts), known=known)

    @property
    def names(self) -> tuple[str, ...]:
        """The sites' names, in order."""
        return tuple(expert.site for expert in self.experts)

    @property
    def tau(self) -> Tensor:
        """Task vectors (K, P) of those still compared."""
        return self.bank.tau[self._rows]

    @property
    def theta(self) -> Tensor:
        """Parameters (K, P) of those still compared."""
        return self.bank.theta[self._rows]

    @property
    def temperatures(self) -> Tensor:
        """(K,), as declared."""
        return torch.tensor([expert.temperature for expert in self.experts])

    def logits(self, view: Any = "none", changed: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None) -> Tensor:
        """Logits (K, n, C) on the probe, or on a view of it; each is computed once. view: names what `changed` does."""
        assert self.probe is not None
        for row in self._rows:
            if (row, view) not in self.known:
                pixels = self.probe.pixels if changed is None else changed(self.probe.pixels)
                self.known[row, view] = torch.nan_to_num(self.bank.row_logits(row, self.probe.batch(pixels)).float())
                self.forwards.append(len(pixels))
        return torch.stack([self.known[row, view] for row in self._rows])

    @cached_property
    def _rows(self) -> list[int]:
        return [self.bank.names.index(expert.site) for expert in self.experts]


class Defence(Plugin):
    """Base of every kind.

    at_target: it acts there, batch by batch, and judges nobody. probe: whether it needs public images; familiar: and whether
    these must show the federation's own classes.
    """

    at_target: ClassVar[bool] = False
    probe: ClassVar[bool] = False
    familiar: ClassVar[bool] = False

    @abstractmethod
    def judge(self, exhibit: Exhibit) -> list[Finding]:
        """One finding for each expert."""

    def repair(self, exhibit: Exhibit, site: str) -> Expert | None:
        """The expert as it can be used after all; None leaves it out."""
        return None


DEFENCES: Folder[Defence] = Folder("fedmerge.experts.defences", Defence, "defence")  # type: ignore[type-abstract]


def others_median(values: Tensor) -> Tensor:
    """The median of all the others, for each of K values (K,); of two in the middle, their mean."""
    rest = [torch.cat([values[:k], values[k + 1 :]]).double() for k in range(len(values))]
    return torch.stack([torch.quantile(one, 0.5) for one in rest]).to(values)


def over_others(values: Tensor) -> Tensor:
    """Each of K positive values over the others' median, (K,), at most `MUCH`, which also stands for what has overflowed."""
    finite = values.double().nan_to_num(nan=MUCH, posinf=MUCH).clamp(max=MUCH)
    return (finite / others_median(finite)).clamp(max=MUCH)


MUCH = 1e9
"""More than any bound."""
