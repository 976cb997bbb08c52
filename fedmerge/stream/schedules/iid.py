"""One random permutation of all images: the easy case."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmerge.stream.schedules._base import Batches, Schedule, cut


class Iid(Schedule):
    """Independent batches: every image once, in random order.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.stream.schedules.iid import Iid
    >>> labels, domains = np.array([0, 1, 0, 1, 0, 1]), np.array([0, 0, 0, 1, 1, 1])
    >>> batches = Iid(batch_size=4).batches(labels, domains, np.random.default_rng(0))
    >>> [len(batch) for batch in batches], sorted(np.concatenate(batches).tolist())
    ([4, 2], [0, 1, 2, 3, 4, 5])
    """

    def batches(self, labels: NDArray[np.int64], domains: NDArray[np.int64], rng: np.random.Generator) -> Batches:
        """Consecutive batches of one permutation; the last may be smaller."""
        return cut(rng.permutation(len(labels)), self.batch_size)
