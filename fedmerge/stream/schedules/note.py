"""Temporally correlated labels as NOTE makes them: each class falls into a few pieces of the stream, one class after another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmerge.stream.schedules._base import Batches, Schedule, cut
from fedmerge.stream.schedules.dirichlet_batch import proportions

SMALLEST_CHUNK = 10
REDRAWS = 2000

Index = NDArray[np.int64]


class Note(Schedule):
    """C chunks for C classes; class k is dealt to chunks by Dir(delta 1_C), of which none may pass N_tot / C by much.

    Within a chunk each class stands in one block, in random order (Gong et al., NOTE, NeurIPS 2022, and its code). Draws are
    repeated until every chunk has 10 images; theirs may repeat for ever, so after 2000 redraws the threshold is halved here. For
    two classes delta hardly matters: every batch is nearly one class.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.stream.schedules.note import Note
    >>> labels = np.repeat([0, 1, 2], 20)
    >>> batches = Note(batch_size=10).batches(labels, np.zeros_like(labels), np.random.default_rng(0))
    >>> [np.bincount(labels[batch], minlength=3).tolist() for batch in batches]  # images of each class
    [[10, 0, 0], [9, 0, 1], [0, 0, 10], [1, 0, 9], [0, 10, 0], [0, 10, 0]]
    """

    delta: float = Field(0.1, gt=0, le=1e4, description="Dirichlet concentration; 0.1 is NOTE's default")

    def batches(self, labels: Index, domains: Index, rng: np.random.Generator) -> Batches:
        """All images once; the last batch may be smaller."""
        return cut(self.order(labels, rng), self.batch_size)

    def order(self, labels: Index, rng: np.random.Generator) -> Index:
        """A permutation (N,) of the images."""
        pools = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        smallest = SMALLEST_CHUNK
        while True:
            for _ in range(REDRAWS):
                chunks = self._deal(pools, rng)
                if min(sum(len(block) for block in chunk) for chunk in chunks) >= smallest:
                    ordered = [chunk[k] for chunk in chunks for k in rng.permutation(len(chunk))]
                    return np.concatenate(ordered).astype(np.int64)
            smallest //= 2

    def _deal(self, pools: list[Index], rng: np.random.Generator) -> list[list[Index]]:
        """For each chunk its block of every class."""
        count, fair = len(pools), sum(len(pool) for pool in pools) / len(pools)
        chunks: list[list[Index]] = [[] for _ in pools]
        for pool in pools:
            held = np.array([sum(len(block) for block in chunk) for chunk in chunks])
            share = np.where(held < fair, proportions(self.delta, count, rng), 0)
            share = share if share.sum() > 0 else (held < fair).astype(float)
            edges = (np.cumsum(share / share.sum()) * len(pool)).astype(int)[:-1]
            for chunk, block in zip(chunks, np.split(rng.permutation(pool), edges), strict=True):
                chunk.append(block)
        return chunks
