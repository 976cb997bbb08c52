"""A target's images, plain or under every condition of a corruption stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmerge.data.cache import let_go
from fedmerge.data.corruptions._base import Shift
from fedmerge.data.images import Images


class Gallery:
    """A target's images, or each of them under every condition: image i under condition c has index c N + i.

    labels, domains: (max(1, conditions) * N,). Conditions take the place of domains. Pixels are shifted when they are asked for, so
    that memory does not grow with the conditions.
    """

    def __init__(self, images: Images, conditions: Sequence[Shift], owner: str, seed: int) -> None:
        self.images, self.conditions = images, tuple(conditions)
        self._owner, self._seed = owner, seed
        times = max(1, len(conditions))
        self.labels: NDArray[np.int64] = np.tile(images.labels, times)
        self.domains: NDArray[np.int64] = np.repeat(np.arange(times), len(images)) if conditions else images.domains
        self.domain_names = tuple(one.name for one in conditions) or images.domain_names

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images (n, H, W, C) at `index` (n,)."""
        place, under = index % len(self.images), index // len(self.images)
        found: NDArray[np.uint8] = np.asarray(self.images.pixels)[place]  # a copy, and one alone
        let_go(self.images.pixels)
        for number, condition in enumerate(self.conditions):
            own = under == number
            if own.any():
                found[own] = condition.shifted(found[own], place[own], self._owner, self._seed)
        return found
