"""Labels that follow one another in time: sorted, in NOTE's blocks, or as a chain that mostly stays where it is."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmerge.stream.schedules._base import Batches, Schedule, cut
from fedmerge.stream.schedules.note import Note

Index = NDArray[np.int64]


class Temporal(Schedule):
    """sorted: a random order, sorted by class. note: as the schedule `note`. markov: an image's class is that of the one before
    with probability `stay`, else drawn in proportion to what is left.

    The papers do not say how their temporal streams are made; `note` is the construction of the test-time adaptation literature,
    and `markov` is ours.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.stream.schedules.temporal import Temporal
    >>> labels, domains = np.array([0, 1, 0, 1, 0, 1]), np.array([0, 0, 0, 1, 1, 1])
    >>> batches = Temporal(order="sorted", batch_size=2).batches(labels, domains, np.random.default_rng(0))
    >>> [labels[batch].tolist() for batch in batches]
    [[0, 0], [0, 1], [1, 1]]
    """

    order: Literal["sorted", "note", "markov"] = Field("note", description="rule by which labels follow one another")
    delta: float = Field(0.1, gt=0, le=1e4, description="Dirichlet concentration, for note")
    stay: float = Field(0.95, ge=0, lt=1, description="probability that the class stays, for markov")

    def batches(self, labels: Index, domains: Index, rng: np.random.Generator) -> Batches:
        """All images once; the last batch may be smaller."""
        if self.order == "note":
            return Note(batch_size=self.batch_size, delta=self.delta).batches(labels, domains, rng)
        if self.order == "sorted":
            shuffled = rng.permutation(len(labels))
            return cut(shuffled[np.argsort(labels[shuffled], kind="stable")].astype(np.int64), self.batch_size)
        return cut(self._chain(labels, rng), self.batch_size)

    def _chain(self, labels: Index, rng: np.random.Generator) -> Index:
        pools = [list(rng.permutation(np.flatnonzero(labels == label))) for label in np.unique(labels)]
        left = np.array([len(pool) for pool in pools])
        order, now = np.empty(len(labels), np.int64), -1
        for position in range(len(labels)):
            if now < 0 or left[now] == 0 or rng.random() >= self.stay:
                now = int(rng.choice(len(pools), p=left / left.sum()))
            order[position] = pools[now].pop()
            left[now] -= 1
        return order
