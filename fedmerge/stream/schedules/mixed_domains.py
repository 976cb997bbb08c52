"""All domains shuffled together, with any order of labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmerge.errors import Problem
from fedmerge.stream.schedules._base import Batches, Schedule, Within, below, unconditional


class MixedDomains(Schedule):
    """The union of the domains in the order that `within` makes, blind to domains (Marsden et al., mixed domains, WACV 2024).

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.stream.schedules.mixed_domains import MixedDomains
    >>> labels, domains = np.array([0, 1, 0, 1, 0, 1]), np.array([0, 0, 0, 1, 1, 1])
    >>> batches = MixedDomains(batch_size=4).batches(labels, domains, np.random.default_rng(0))
    >>> [domains[batch].tolist() for batch in batches]
    [[1, 0, 1, 1], [0, 0]]
    """

    within: Within = Field("iid", validate_default=True, description="schedule of all images together; it sees labels, not domains")

    def check(self, domains: tuple[str, ...]) -> list[Problem]:
        """What is wrong with the inner schedule: one that needs domains has none here."""
        return [*unconditional("within", self.within), *below("within", self.within.check(("the union",)))]

    def batches(self, labels: NDArray[np.int64], domains: NDArray[np.int64], rng: np.random.Generator) -> Batches:
        """The inner schedule's batches of images that all seem to be of one domain."""
        inner = self.within.model_copy(update={"batch_size": self.batch_size})
        return inner.batches(labels, np.zeros_like(domains), rng)
