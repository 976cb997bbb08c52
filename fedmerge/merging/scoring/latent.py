"""What a batch does not say outright: which site each image resembles, and which labels the batch holds. EM, no forwards.

Axes: K experts, N images, C classes. Natural logarithms, float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ITERATIONS = 20
"""Of EM; what is left after them is below the third digit."""


@dataclass(frozen=True)
class Explained:
    """r: (N, K) posterior of each image's site. sites: (K,) shares of the batch. labels: (C,) shares, uniform where the evidence
    for others does not pay for their parameters. gain: log-likelihood that the labels' shares bring, nats."""

    r: Tensor
    sites: Tensor
    labels: Tensor
    gain: float


def explain(scores: Tensor, log_p: Tensor, sites: Tensor, pseudo: float = 1.0, label_shares: bool = True) -> Explained:
    """EM over two latents of each image: its site k with shares pi, and its label y with shares b.

    p(k, y | x_i) is proportional to pi_k exp(s_ik) p_k(y | x_i) b_y: experts that are sure of labels which the batch does not hold
    lose share. M steps add `pseudo` images, spread evenly. b stays uniform if it does not gain (C - 1)/2 log N nats (BIC).

    scores: s (N, K), -inf for an expert that is not valid. log_p: (K, N, C) of the experts. sites: (K,) where EM starts.
    """
    N, K = scores.shape
    C = log_p.shape[-1]
    even = torch.full((C,), 1 / C, dtype=torch.float64)
    p = log_p.double().cpu().exp().nan_to_num().transpose(0, 1)  # (N, K, C)
    scores = scores.double().cpu()

    def run(free: bool) -> tuple[Tensor, Tensor, Tensor, float]:
        pi, b = sites.double().cpu(), even
        for _ in range(ITERATIONS):
            r, y, likelihood = _posterior(scores, p, pi, b)
            pi = (r.sum(0) + pseudo / K) / (N + pseudo)
            if free:
                b = (y.sum(0) + pseudo / C) / (N + pseudo)
        r, _, likelihood = _posterior(scores, p, pi, b)
        return r, pi, b, likelihood

    plain = run(False)
    if not label_shares or C < 2:
        return Explained(*plain[:3], 0.0)
    free = run(True)
    gain = free[3] - plain[3]
    return Explained(*(free if pays(gain, N, C) else plain)[:3], gain)


def _posterior(scores: Tensor, p: Tensor, pi: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
    """r (N, K), the labels' posterior (N, C), and the log-likelihood up to a constant."""
    inside = p @ b * len(b)  # (N, K): how likely an expert's labels are in this batch, 1 under even shares
    joint = pi.log() + scores + inside.clamp(min=1e-300).log()
    total = joint.logsumexp(1, keepdim=True)
    r = (joint - total).exp()
    each = p * b
    each = each / each.sum(-1, keepdim=True).clamp(min=1e-300)
    return r, (r[..., None] * each).sum(1), float(total.sum())


def pays(gain: float, N: int, C: int) -> bool:
    """Whether shares of C labels gain more than BIC asks for their C - 1 parameters, from N images."""
    return gain > (C - 1) / 2 * math.log(max(N, 2))


def label_shares(log_p: Tensor, pseudo: float = 1.0) -> Tensor:
    """Shares (C,) of the labels in a batch, by EM on log p (N, C); uniform if they do not pay (Saerens et al., 2002, eq. 9)."""
    p = log_p.double().cpu().exp()
    N, C = p.shape
    b = even = p.new_full((C,), 1 / C)
    for _ in range(ITERATIONS):
        y = p * b
        b = ((y / y.sum(1, keepdim=True)).sum(0) + pseudo / C) / (N + pseudo)
    gain = float((p @ b * C).log().sum())
    return b if pays(gain, N, C) else even


def under(shares: Tensor, log_p: Tensor) -> Tensor:
    """log p'(y | x) (N, C), p'(y | x) proportional to p(y | x) b_y."""
    moved = log_p + shares.to(log_p).log()
    return moved - moved.logsumexp(-1, keepdim=True)
