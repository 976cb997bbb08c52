"""Every batch has class proportions of its own, drawn from a Dirichlet distribution: the smaller delta, the fewer classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmerge.stream.schedules._base import Batches, Schedule


class DirichletBatch(Schedule):
    """pi ~ Dir(delta 1_C) for each batch; n ~ Multinomial(N, pi) images of each class, without replacement.

    Late batches see depleted classes, so the mix drifts towards what is left: compare the halves of the stream.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.stream.schedules.dirichlet_batch import DirichletBatch
    >>> labels = np.repeat([0, 1, 2], 8)
    >>> batches = DirichletBatch(delta=0.01, batch_size=6).batches(labels, np.zeros_like(labels), np.random.default_rng(0))
    >>> [labels[batch].tolist() for batch in batches]
    [[1, 1, 1, 1, 1, 1], [0, 2, 1, 0, 1, 0], [2, 0, 0, 0, 2, 0], [2, 2, 0, 2, 2, 2]]
    """

    delta: float = Field(0.1, gt=0, le=1e4, description="Dirichlet concentration: 0.01 is nearly one class per batch")

    def batches(self, labels: NDArray[np.int64], domains: NDArray[np.int64], rng: np.random.Generator) -> Batches:
        """Batches of `batch_size` images until none is left; the last may be smaller."""
        pools = [list(rng.permutation(np.flatnonzero(labels == label))) for label in np.unique(labels)]
        batches: Batches = []
        while any(pools):
            batches.append(rng.permutation(self._fill(pools, rng)).astype(np.int64))
        return batches

    def _fill(self, pools: list[list[int]], rng: np.random.Generator) -> list[int]:
        """One batch; redraws while it is not full, because a class may run out."""
        pi = proportions(self.delta, len(pools), rng)
        batch: list[int] = []
        while len(batch) < self.batch_size and any(pools):
            left = np.array([len(pool) for pool in pools])
            alive = np.where(left > 0, pi, 0)
            weights = alive if alive.sum() > 0 else left.astype(float)
            wanted = rng.multinomial(self.batch_size - len(batch), weights / weights.sum())
            for pool, count in zip(pools, np.minimum(wanted, left), strict=True):
                batch += [pool.pop() for _ in range(count)]
        return batch


def proportions(delta: float, classes: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Shares of classes, drawn from Dir(delta 1_C); uniform where a very small delta underflows to nothing or NaN.

    Parameters
    ----------
    delta : float
        Concentration, greater than 0.
    classes : int
        C.
    rng : np.random.Generator
        Where the draw comes from.

    Returns
    -------
    NDArray[np.float64]
        (C,), on the simplex.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.stream.schedules.dirichlet_batch import proportions
    >>> shares = proportions(1.0, 3, np.random.default_rng(0))
    >>> shares.shape, round(float(shares.sum()), 6)
    ((3,), 1.0)
    """
    pi = rng.dirichlet(np.full(classes, delta))
    return pi if np.isfinite(pi).all() and pi.sum() > 0 else np.full(classes, 1 / classes)
