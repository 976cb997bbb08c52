"""Does an expert see anything in an image that the others see too?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.federated.defenses._base import Defense, Exhibit, Finding
from fedmerge.federated.defenses.calibration import scales
from fedmerge.merging.scoring.divergence import jsd
from fedmerge.merging.scoring.outliers import others_median


class Agreement(Defense):
    """Jensen-Shannon divergence to the leave-one-out consensus, against chance; and whether any class is told as by the others.

    q_k(x) = (1/(K-1)) sum_{j != k} p_j(x), p_j from logits of scale 1, so that nobody is loud. With D_k the mean of
    JSD(p_k(x_i), q_k(x_i)) and E_k that of JSD(p_k(x_i), q_k(x_j)), j != i, the agreement is A_k = 1 - D_k / E_k: 1 if k says what
    the others say, 0 if its prediction has nothing to do with the image, negative if it says what they do not.
    An honest hospital that knows few classes agrees little, but on those it agrees: J_k is the largest, over classes c, of the mean
    of p_k(c|x) where the consensus is c minus that where it is not. An expert is odd if both A_k and J_k are small beside the
    others' medians. It needs public images of the federation's own classes: on others, honest experts need not agree. Where the
    others' median of A is below `least` they do not agree among themselves, and nobody is odd.
    """

    probe: ClassVar[bool] = True
    familiar: ClassVar[bool] = True

    share: float = Field(0.3, ge=0, lt=1, description="least A_k of an expert that is not odd, as a share of the others' median")
    best: float = Field(0.4, ge=0, lt=1, description="least J_k that is not odd, as a share of the others' median")
    least: float = Field(0.15, gt=0, lt=1, description="least agreement among the others; below it nobody is odd")

    def judge(self, exhibit: Exhibit) -> list[Finding]:
        """Odd is who breaks both bounds; the value is J_k."""
        log_p = level(exhibit.logits())
        A, J = agreement(log_p), best_class(log_p)
        of_A, of_J, found = others_median(A), others_median(J), []
        for k, site in enumerate(exhibit.names):
            a, j, others = float(A[k]), float(J[k]), float(of_A[k])
            low, bound = self.share * others, self.best * float(of_J[k])
            said = f"agrees with the others {a:.2f} (0 is chance), least {low:.2f}; on its best class {j:.2f}, least {bound:.2f}"
            excess = min(1 + low - a, 1 + bound - j)
            if others < self.least:
                said, excess = f"agrees with the others {a:.2f}, but they do not among each other ({others:.2f}): cannot tell", 0.0
            found.append(Finding(site, self.kind(), j, bound, excess, said))
        return found


def level(logits: Tensor) -> Tensor:
    """log p (K, n, C) from logits (K, n, C), each expert's brought to one scale first."""
    scale = scales(logits).clamp(min=1e-12)[:, None, None]
    return torch.log_softmax(SHARPNESS * (logits - logits.mean(-1, keepdim=True)) / scale, -1)


def consensuses(log_p: Tensor) -> Iterator[Tensor]:
    """log q_k (n, C) of the others, for each of K experts (K, n, C); of many, from one sum in float64."""
    K = len(log_p)
    if K <= MANY:
        for k in range(K):
            yield torch.logsumexp(torch.cat([log_p[:k], log_p[k + 1 :]]), 0) - math.log(K - 1)
        return
    total = sum((one.double().exp() for one in log_p), torch.zeros_like(log_p[0], dtype=torch.float64))
    for one in log_p:
        rest = (total - one.double().exp()).clamp(min=torch.finfo(log_p.dtype).tiny)
        yield (rest.log() - math.log(K - 1)).to(log_p)


def agreement(log_p: Tensor) -> Tensor:
    """A (K,) of log p (K, n, C)."""
    found = []
    for one, others in zip(log_p, consensuses(log_p), strict=True):
        own, chance = matched_and_crossed(one, others)
        found.append(1 - own / chance.clamp(min=1e-12))
    return torch.stack(found)


def best_class(log_p: Tensor) -> Tensor:
    """J (K,) of log p (K, n, C), over the classes that the consensus gives to a few images at least; 0 if there is none."""
    n, C = log_p.shape[1:]
    found = []
    for one, others in zip(log_p, consensuses(log_p), strict=True):
        of = torch.nn.functional.one_hot(others.argmax(-1), C).to(log_p)  # (n, C)
        p, there = one.exp(), of.sum(0)
        J = (p * of).sum(0) / there.clamp(min=1) - (p * (1 - of)).sum(0) / (n - there).clamp(min=1)
        found.append(torch.where((there >= max(FEW, n / (4 * C))) & (there < n), J, 0).amax())
    return torch.stack(found)


def matched_and_crossed(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Means of JSD(p(x_i), q(x_i)), and of JSD(p(x_i), q(x_j)) over all i != j; (n, C) each."""
    n = len(log_p)
    own = jsd(log_p, log_q).sum()
    whole = torch.stack([jsd(part[:, None], log_q[None]).sum() for part in torch.split(log_p, ROWS)]).sum()
    return own / n, (whole - own) / (n * (n - 1))


MANY = 64
"""Experts up to which the others' predictions are summed anew for each of them, which takes their number squared."""

SHARPNESS = 2.0
"""Scale of the logits that are compared: about that of an expert which is sure of most images."""

ROWS = 32
"""Images crossed with all at a time: bounds the memory."""

FEW = 5
"""Images of a class, by the consensus, from which it counts."""
