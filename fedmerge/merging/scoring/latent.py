"""What a batch does not say outright: which site each image resembles, and which labels the batch holds. EM, no forwards.

Axes: K experts, N images, C classes. Natural logarithms, float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

ITERATIONS = 20
"""Of EM; what is left after them is below the third digit."""

Seen = Mapping[str, Tensor]
"""Of the stream so far. labels: (C,) images of each class, in expectation. gain: (1,) nats that the stream's shares have told more
of the labels of each next batch than even shares."""


def site_shares(scores: Tensor, shares: Tensor, each: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """EM over the site of each image: r_ik is proportional to pi_k exp(s_ik), pi_k = (sum_i r_ik + a_k) / (N + sum_k a_k).

    Without a EM gives most of the shares to whoever is sure of everything, where images are few for each expert.

    Parameters
    ----------
    scores : Tensor
        s (N, K), log-likelihoods; -inf for an expert that is not valid.
    shares : Tensor
        pi (K,) where EM starts, on the simplex.
    each : Tensor, optional
        a (K,), images that each expert has beside those of the batch; default 1.

    Returns
    -------
    tuple[Tensor, Tensor]
        r (N, K), rows on the simplex, and the shares pi (K,) of the batch.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.latent import site_shares
    >>> scores = torch.tensor([[0.0, -2.0], [0.0, -2.0], [-2.0, 0.0]])
    >>> r, shares = site_shares(scores, shares=torch.tensor([0.5, 0.5]))
    >>> r.round(decimals=2)  # whose images these are
    tensor([[0.9200, 0.0800],
            [0.9200, 0.0800],
            [0.1700, 0.8300]], dtype=torch.float64)
    >>> shares.round(decimals=2)
    tensor([0.6000, 0.4000], dtype=torch.float64)
    """
    N = len(scores)
    scores, pi = scores.double().cpu(), shares.double().cpu()
    each = torch.ones_like(pi) if each is None else each.double().cpu()
    for _ in range(ITERATIONS):
        pi = ((pi.log() + scores).softmax(1).sum(0) + each) / (N + each.sum())
    return (pi.log() + scores).softmax(1), pi


def label_shares(log_p: Tensor, seen: Seen | None = None, pseudo: float = 1.0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Shares of the labels in a batch, shares in the stream before it, and what has been seen with it.

    b maximizes the likelihood prod_i sum_c p_ic b_c, by EM, with `pseudo` images spread evenly.
    It stands if it gains (C - 1) / 2 log N nats (BIC) over even shares, and over those of the stream so far: a model that says one
    class too often says so in every batch, and that is no reason to believe it. Otherwise shares are even. Those of the stream are
    given where they have told more of its batches than even ones have, by as much for all its images; else they are even.

    Parameters
    ----------
    log_p : Tensor
        (N, C), relative to even shares.
    seen : Seen, optional
        Of the stream before this batch; other names are passed over.
    pseudo : float, default 1.0
        Images that are spread evenly over the classes.

    Returns
    -------
    tuple[Tensor, Tensor, dict[str, Tensor]]
        Shares (C,) of the batch, shares (C,) of the stream, and what has been seen.

    References
    ----------
    Saerens et al., Adjusting the outputs of a classifier to new a priori probabilities, 2002, equation 9.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.latent import label_shares
    >>> log_p = torch.tensor([[0.9, 0.1]] * 30 + [[0.1, 0.9]] * 2).log()
    >>> batch, stream, seen = label_shares(log_p)
    >>> batch.round(decimals=2)  # hardly any image of the second class
    tensor([0.9700, 0.0300], dtype=torch.float64)
    >>> stream  # nothing is known of the stream before its first batch
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    p = log_p.double().cpu().exp()
    N, C = p.shape
    b = even = p.new_full((C,), 1 / C)
    seen = {"labels": p.new_zeros(C), "gain": p.new_zeros(1)} | dict(seen or {})
    stream = (seen["labels"] + 1) / (seen["labels"].sum() + C)
    for _ in range(ITERATIONS):
        y = p * b
        y = y / y.sum(1, keepdim=True)
        b = (y.sum(0) + pseudo / C) / (N + pseudo)

    def told(shares: Tensor) -> float:
        return float((p @ shares).log().sum())

    stands = pays(told(b) - max(told(even), told(stream)), N, C)
    after = {"labels": seen["labels"] + y.sum(0), "gain": seen["gain"] + told(stream) - told(even)}
    known = pays(float(seen["gain"]), int(seen["labels"].sum()), C)
    return b if stands else even, stream if known else even, after


def pays(gain: float, N: int, C: int) -> bool:
    """Whether shares of C labels gain more than BIC asks for their C - 1 parameters.

    Parameters
    ----------
    gain : float
        In log-likelihood, nats.
    N : int
        Images.
    C : int
        Classes.

    Returns
    -------
    bool
        True if they do.

    Examples
    --------
    >>> from fedmerge.merging.scoring.latent import pays
    >>> pays(gain=3.0, N=32, C=2), pays(gain=3.0, N=32, C=9)
    (True, False)
    """
    return gain > (C - 1) / 2 * math.log(max(N, 2))


def under(shares: Tensor, log_p: Tensor) -> Tensor:
    """Predictions under other shares of labels: p'(y | x) proportional to p(y | x) b_y.

    Parameters
    ----------
    shares : Tensor
        b (C,), on the simplex.
    log_p : Tensor
        (N, C), relative to even shares.

    Returns
    -------
    Tensor
        log p' (N, C).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.latent import under
    >>> under(torch.tensor([0.9, 0.1]), torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log()).exp()
    tensor([[0.9000, 0.1000],
            [0.5000, 0.5000]])
    """
    moved = log_p + shares.to(log_p).log()
    return moved - moved.logsumexp(-1, keepdim=True)
