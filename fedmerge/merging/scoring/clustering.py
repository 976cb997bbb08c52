"""A few groups of coefficient rows, so that one merge serves many images. Rows lie on the simplex (N, K); float64 throughout.

Oh et al., DaWin, ICLR 2025, appendix A: a Beta mixture for two models. For more, k-means or a Dirichlet mixture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EDGE = 1e-6
"""Rows are kept this far inside the simplex, where densities are finite."""

TOLERANCE, ITERATIONS, RESTARTS = 1e-4, 1000, 3


@dataclass(frozen=True)
class Clusters:
    """Clusters of rows.

    Attributes
    ----------
    centers : Tensor
        (M, K).
    member : Tensor
        (N,) int64, the cluster of each row, from 0.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.clustering import Clusters
    >>> found = Clusters(centers=torch.tensor([[0.9, 0.1], [0.2, 0.8]]), member=torch.tensor([0, 1, 0]))
    >>> found.rows
    tensor([[0.9000, 0.1000],
            [0.2000, 0.8000],
            [0.9000, 0.1000]])
    """

    centers: Tensor
    member: Tensor

    @property
    def rows(self) -> Tensor:
        """Every row replaced by its cluster's center, (N, K)."""
        return self.centers[self.member]


def kmeans(rows: Tensor, count: int, seed: int, restarts: int = RESTARTS) -> Clusters:
    """The best of some runs of Lloyd's algorithm from k-means++ starts.

    Parameters
    ----------
    rows : Tensor
        (N, K).
    count : int
        Clusters, at least 1; as many as there are distinct rows if these are fewer.
    seed : int
        Of the starts.
    restarts : int, default RESTARTS
        Number of runs.

    Returns
    -------
    Clusters
        Centers and members.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.clustering import kmeans
    >>> rows = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]])
    >>> kmeans(rows, count=2, seed=0).rows
    tensor([[0.8500, 0.1500],
            [0.8500, 0.1500],
            [0.1000, 0.9000]])
    """
    count = min(count, _distinct(rows))
    runs = [_lloyd(rows, _spread_starts(rows, count, seed + restart)) for restart in range(restarts)]
    return min(runs, key=lambda found: float(((rows - found.rows) ** 2).sum()))


def mixture(rows: Tensor, count: int, seed: int) -> Clusters:
    """A Dirichlet mixture by EM with moment matching, for K = 2 the paper's Beta mixture; membership by posterior.

    E: log g_im = log pi_m + log Dir(x_i; alpha_m). M: pi = mean g; m, v = weighted mean and variance of the rows;
    s = median_k m_k (1 - m_k) / v_k - 1 (for K = 2 at least 3, as v <= m (1 - m) / 4), alpha = s m. Stop at a change of the mean
    log-likelihood below 1e-4, or after 1000 iterations; the run of largest likelihood is kept. Coefficients are the means m.

    Parameters
    ----------
    rows : Tensor
        (N, K), on the simplex.
    count : int
        Clusters at most, at least 1.
    seed : int
        Of the starts.

    Returns
    -------
    Clusters
        Centers and members.

    References
    ----------
    Oh et al., DaWin, ICLR 2025, section 3.3 and the authors' code.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.clustering import mixture
    >>> rows = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.85, 0.15], [0.1, 0.9], [0.2, 0.8]])
    >>> found = mixture(rows, count=2, seed=0)
    >>> found.centers.round(decimals=2)
    tensor([[0.1500, 0.8500],
            [0.8500, 0.1500]], dtype=torch.float64)
    """
    x = rows.double().clamp(EDGE, 1 - EDGE)
    x = x / x.sum(1, keepdim=True)
    count = min(count, _distinct(x))
    runs = [_fitted(x, kmeans(x, count, seed + restart, restarts=1)) for restart in range(RESTARTS)]
    return max(runs, key=lambda run: run[0])[1]


def nearest_center(rows: Tensor, centers: Tensor) -> Tensor:
    """The nearest center of each row.

    Parameters
    ----------
    rows : Tensor
        (N, K).
    centers : Tensor
        (M, K).

    Returns
    -------
    Tensor
        (N,) int64, from 0.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.clustering import nearest_center
    >>> nearest_center(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), centers=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([0, 1])
    """
    return _distances(rows, centers).argmin(1)


def _distances(rows: Tensor, centers: Tensor) -> Tensor:
    """(N, M), from differences: by inner products, as torch has it for more than 25 rows, what is nearer than 1e-8 is at 0."""
    return torch.cdist(rows, centers, compute_mode="donot_use_mm_for_euclid_dist")


def _fitted(x: Tensor, start: Clusters) -> tuple[float, Clusters]:
    """One run of EM: its likelihood and its clusters."""
    g = torch.nn.functional.one_hot(start.member, len(start.centers)).double()
    likelihood = -torch.inf
    pi, m, alpha = _moments(x, g)
    for _ in range(ITERATIONS):
        log_g = pi.log() + _log_dirichlet(x[:, None], alpha)
        before, likelihood = likelihood, float(log_g.logsumexp(1).mean())
        pi, m, alpha = _moments(x, log_g.softmax(1))  # also after the last E step, as in the authors' code
        if abs(likelihood - before) < TOLERANCE:
            break
    return likelihood, Clusters(m, (pi.log() + _log_dirichlet(x[:, None], alpha)).argmax(1))


def _log_dirichlet(x: Tensor, alpha: Tensor) -> Tensor:
    """log density of Dir(alpha) at x; (N, 1, K) and (M, K) -> (N, M)."""
    return ((alpha - 1) * x.log()).sum(-1) + alpha.sum(-1).lgamma() - alpha.lgamma().sum(-1)


def _distinct(rows: Tensor) -> int:
    return len(set(map(tuple, rows.tolist())))


def _moments(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """pi (M,), means (M, K) and concentrations (M, K) of responsibilities g (N, M)."""
    tiny = 10 * torch.finfo(torch.float64).eps
    weight = g.sum(0) + tiny
    m = (g.T @ x) / weight[:, None]
    m = torch.where(m.sum(1, keepdim=True) > 0, m, x.mean(0))  # of a cluster that no row is in
    m = m / m.sum(1, keepdim=True)
    v = ((g.T @ x**2) / weight[:, None] - m**2).clamp(min=0)
    s = (m * (1 - m) / (v + 1e-10)).median(1).values - 1
    s = s.clamp(min=3.0 if x.shape[1] == 2 else 1e-3)
    return weight / weight.sum(), m, s[:, None] * m


def _spread_starts(rows: Tensor, count: int, seed: int) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii, SODA 2007): each start drawn with probability ~ squared distance to those before."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    while len(chosen) < count:
        distance = _distances(rows, rows[chosen]).amin(1)
        distance = (distance / distance.max()) ** 2  # squares of very small ones would be 0
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    return rows[chosen]


def _lloyd(rows: Tensor, centers: Tensor) -> Clusters:
    member = nearest_center(rows, centers)
    for _ in range(100):
        groups = [rows[member == m] for m in range(len(centers))]
        centers = torch.stack([group.mean(0) if len(group) else old for group, old in zip(groups, centers, strict=True)])
        moved = nearest_center(rows, centers)
        if torch.equal(moved, member):
            break
        member = moved
    return Clusters(centers, member)
