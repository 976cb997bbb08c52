"""One image at a time, in any order: the hardest batch to fit a model to."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmerge.data.corruptions._base import Shift
from fedmerge.errors import Problem
from fedmerge.stream.schedules._base import Batches, Schedule, Within, below


class Single(Schedule):
    """Batches of one, in the order of the schedule `of`, whose own batch size says how many images share a mix.

    With one image, entropies are noisy: the moving average of `eam` wants rho of 0.9 or more here.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.stream.schedules.single import Single
    >>> labels, domains = np.array([0, 1, 0, 1, 0, 1]), np.array([0, 0, 0, 1, 1, 1])
    >>> batches = Single().batches(labels, domains, np.random.default_rng(0))
    >>> [len(batch) for batch in batches]
    [1, 1, 1, 1, 1, 1]
    """

    batch_size: Literal[1] = Field(1, description="images per batch: always 1")
    of: Within = Field("iid", validate_default=True, description="schedule that decides the order of the images")

    def check(self, domains: tuple[str, ...]) -> list[Problem]:
        """What is wrong with the inner schedule."""
        return below("of", self.of.check(domains))

    def conditions(self) -> tuple[Shift, ...]:
        """Those of the inner schedule."""
        return self.of.conditions()

    def batches(self, labels: NDArray[np.int64], domains: NDArray[np.int64], rng: np.random.Generator) -> Batches:
        """Every image that the inner schedule uses, alone."""
        return [batch[i : i + 1] for batch in self.of.batches(labels, domains, rng) for i in range(len(batch))]
