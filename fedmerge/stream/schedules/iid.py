"""One random permutation of all images: the easy case."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmerge.stream.schedules._base import Batches, Schedule, cut


class Iid(Schedule):
    """Independent batches: every image once, in random order."""

    def batches(self, labels: NDArray[np.int64], domains: NDArray[np.int64], rng: np.random.Generator) -> Batches:
        """Consecutive batches of one permutation; the last may be smaller."""
        return cut(rng.permutation(len(labels)), self.batch_size)
