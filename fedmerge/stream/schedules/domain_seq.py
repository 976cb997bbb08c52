"""One domain after another, each in an order of its own: first all of one scanner, then all of the next."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmerge.errors import Problem
from fedmerge.stream.schedules._base import Batches, Schedule, Within, below, unconditional


class DomainSeq(Schedule):
    """For each domain the batches that `within` makes of its images, as in continual adaptation (Wang et al., CoTTA, CVPR 2022).

    No batch mixes domains, so that the last batch of each may be smaller. `within` is a schedule by its name, or with its keys; it
    gets this schedule's batch size.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.stream.schedules.domain_seq import DomainSeq
    >>> labels, domains = np.array([0, 1, 0, 1, 0, 1]), np.array([0, 0, 0, 1, 1, 1])
    >>> batches = DomainSeq(batch_size=2).batches(labels, domains, np.random.default_rng(0))
    >>> [domains[batch].tolist() for batch in batches]
    [[0, 0], [0], [1, 1], [1]]
    """

    order: Literal["given", "random"] = Field("given", description="order of the domains: as the target names them, or drawn")
    within: Within = Field("iid", validate_default=True, description="schedule of the images of one domain")

    def check(self, domains: tuple[str, ...]) -> list[Problem]:
        """What is wrong with the inner schedule, of which every domain is a world of its own."""
        return [*unconditional("within", self.within), *below("within", self.within.check(domains[:1]))]

    def batches(self, labels: NDArray[np.int64], domains: NDArray[np.int64], rng: np.random.Generator) -> Batches:
        """All images that the inner schedule uses, domain by domain."""
        present = np.unique(domains)
        inner = self.within.model_copy(update={"batch_size": self.batch_size})
        found: Batches = []
        for domain in rng.permutation(present) if self.order == "random" else present:
            own = np.flatnonzero(domains == domain)
            found += [own[batch] for batch in inner.batches(labels[own], domains[own], rng)]
        return found
