"""Does an expert see anything in an image that the others see too?"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.experts.defence import Defence, Exhibit, Finding, others_median
from fedmerge.experts.defences.calibration import scales
from fedmerge.merge.entropy import jsd


class Agreement(Defence):
    """Jensen-Shannon divergence to the leave-one-out consensus, measured against chance.

    q_k(x) = (1/(K-1)) sum_{j != k} p_j(x), p_j from logits of scale 1, so that nobody is loud. With D_k the mean of
    JSD(p_k(x_i), q_k(x_i)) and E_k that of JSD(p_k(x_i), q_k(x_j)), j != i, the agreement is A_k = 1 - D_k / E_k: 1 if k says what
    the others say, 0 if its prediction has nothing to do with the image, negative if it says what they do not.
    An expert is odd if A_k is below `share` of the others' median. Where that median is below `least` the others do not agree among
    themselves, as on images that nobody was trained for, and nobody is odd.
    """

    probe: ClassVar[bool] = True

    share: float = Field(0.3, ge=0, lt=1, description="least agreement that is not odd, as a share of the others' median")
    least: float = Field(0.15, gt=0, lt=1, description="agreement of the others from which their judgement counts")

    def judge(self, exhibit: Exhibit) -> list[Finding]:
        """A_k against the others' median."""
        A = agreement(exhibit.logits())
        found = []
        for site, own, median in zip(exhibit.names, A.tolist(), others_median(A).tolist(), strict=True):
            bound = self.share * median
            said = f"agrees with the others {own:.2f} (0 is chance), they among each other {median:.2f}; least {bound:.2f}"
            if median < self.least:
                said = f"agrees with the others {own:.2f}, but they do not among each other ({median:.2f}): cannot tell"
            excess = 0.0 if median < self.least else 1 + bound - own
            found.append(Finding(site, self.kind(), own, bound, excess, said))
        return found


def agreement(logits: Tensor) -> Tensor:
    """A (K,) of logits (K, n, C), each expert's brought to scale 1 first."""
    scale = scales(logits).clamp(min=1e-12)[:, None, None]
    log_p = torch.log_softmax(SHARPNESS * (logits - logits.mean(-1, keepdim=True)) / scale, -1)
    K = len(log_p)
    found = []
    for k in range(K):
        q = torch.logsumexp(torch.cat([log_p[:k], log_p[k + 1 :]]), 0) - math.log(K - 1)
        own, chance = matched_and_crossed(log_p[k], q)
        found.append(1 - own / chance.clamp(min=1e-12))
    return torch.stack(found)


def matched_and_crossed(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Means of JSD(p(x_i), q(x_i)), and of JSD(p(x_i), q(x_j)) over all i != j; (n, C) each."""
    n = len(log_p)
    own = jsd(log_p, log_q).sum()
    whole = torch.stack([jsd(part[:, None], log_q[None]).sum() for part in torch.split(log_p, ROWS)]).sum()
    return own / n, (whole - own) / (n * (n - 1))


SHARPNESS = 2.0
"""Scale of the logits that are compared: about that of an expert which is sure of most images."""

ROWS = 32
"""Images crossed with all at a time: bounds the memory."""
