"""The mix of domains changes along the stream: today mostly one scanner, tomorrow another."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmerge.errors import Problem
from fedmerge.stream.schedules._base import Batches, Schedule

SPREAD = 0.5
"""Dirichlet concentration of a random drift."""


class MixtureDrift(Schedule):
    """Batch t draws from Q_t = sum_m pi_m(t) P_m over M domains, without replacement, for T batches, u = t / (T - 1).

    smooth: pi_1 = (1 + cos(pi u)) / 2 for M = 2, tents around m / (M - 1) for more. abrupt: M equal segments, each of one
    domain (or `purity` of it, the rest shared by the others). recurring: the same, `cycles` times over. gradual_severity: domains
    are severities, which rise and fall: 1, 2, .., M, .., 2, 1. random: pi(t) ~ Dir(0.5) for each batch.

    T = floor(min_m |P_m| / (N mean_u pi_m)), or fewer where N sum_t pi_m(t) is more than |P_m|, so that domains
    last in expectation; if one runs dry all the same, the stream stops there.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.stream.schedules.mixture_drift import MixtureDrift
    >>> MixtureDrift(drift="smooth").mixture(length=5, domains=2).round(2)[:, 0]  # share of the first domain
    array([1.  , 0.85, 0.5 , 0.15, 0.  ])
    >>> domains = np.repeat([0, 1], 12)
    >>> batches = MixtureDrift(drift="abrupt", batch_size=4).batches(np.zeros_like(domains), domains, np.random.default_rng(0))
    >>> [domains[batch].tolist() for batch in batches]
    [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    """

    drift: Literal["smooth", "abrupt", "recurring", "gradual_severity", "random"] = Field(
        "smooth", description="how the mix of domains changes"
    )
    purity: float = Field(1.0, gt=0, le=1, description="share of a segment's own domain in its batches, for drifts with segments")
    cycles: int = Field(3, ge=1, le=100, description="number of cycles of a recurring drift")

    def check(self, domains: tuple[str, ...]) -> list[Problem]:
        """A drift needs two domains to drift between."""
        if len(domains) > 1:
            return []
        return [Problem("", "kind", f"a drift over one domain ({', '.join(domains)})", "a target with two domains or more")]

    def batches(self, labels: NDArray[np.int64], domains: NDArray[np.int64], rng: np.random.Generator) -> Batches:
        """T batches of `batch_size` images, fewer if a domain runs dry."""
        pools = [list(rng.permutation(np.flatnonzero(domains == domain))) for domain in np.unique(domains)]
        batches: Batches = []
        length = self.length([len(pool) for pool in pools])
        shares = rng.dirichlet(np.full(len(pools), SPREAD), length) if self.drift == "random" else self.mixture(length, len(pools))
        for pi in shares:
            wanted = rng.multinomial(self.batch_size, pi)
            if any(count > len(pool) for pool, count in zip(pools, wanted, strict=True)):
                break
            drawn = [pool.pop() for pool, count in zip(pools, wanted, strict=True) for _ in range(count)]
            batches.append(rng.permutation(drawn).astype(np.int64))
        return batches

    def mixture(self, length: int, domains: int) -> NDArray[np.float64]:
        """pi (T, M): the share of every domain in every batch, in expectation where it is drawn; rows sum to 1."""
        u = np.linspace(0, 1, length) if length > 1 else np.zeros(length)
        if self.drift == "random":
            return np.full((length, domains), 1 / domains)
        if self.drift != "smooth":
            visited = self._visited(domains)
            segment = visited[np.minimum((np.arange(length) * len(visited)) // max(length, 1), len(visited) - 1)]
            rest = (1 - self.purity) / max(1, domains - 1)
            return np.where(np.arange(domains) == segment[:, None], self.purity, rest)
        if domains == 2:
            first = (1 + np.cos(np.pi * u)) / 2
            return np.stack([first, 1 - first], 1)
        peaks = np.arange(domains) / (domains - 1)
        tents = np.clip(1 - np.abs(u[:, None] - peaks) * (domains - 1), 0, None)
        shares: NDArray[np.float64] = tents / tents.sum(1, keepdims=True)
        return shares

    def _visited(self, domains: int) -> NDArray[np.int64]:
        """The domain of each segment, in order."""
        up = np.arange(domains)
        if self.drift == "gradual_severity":
            return np.concatenate([up, up[-2::-1]])
        return np.tile(up, self.cycles if self.drift == "recurring" else 1)

    def length(self, sizes: list[int]) -> int:
        """T for domains of these sizes. A segment is whole batches, so what a domain has to give depends on T itself."""
        N, pools = self.batch_size, np.array(sizes)
        T = int(np.min(pools / (N * self.mixture(1000, len(sizes)).mean(0))) + 1e-9)
        while T > 0 and bool((N * self.mixture(T, len(sizes)).sum(0) > pools + 1e-6).any()):
            T -= 1
        return T
