"""Has an expert moved much farther from theta_0 than the others, or against them?"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.experts.defence import Defence, Exhibit, Finding, over_others


class Norms(Defence):
    """From weights alone: |tau_k| over the others' median, of encoder and head each, and the cosine to the others' mean.

    The bounds are wide, because what hospitals see and how long they train differ; they are there for what no training makes.
    """

    probe: ClassVar[bool] = False

    most: float = Field(4.0, gt=1, description="largest |tau_k| that is not odd, as a multiple of the others' median")
    least_cosine: float = Field(-0.2, ge=-1, le=0, description="least cosine between tau_k and the mean of the others")

    def judge(self, exhibit: Exhibit) -> list[Finding]:
        """The larger of both parts' multiples, and the cosine of the encoder."""
        bank, tau = exhibit.bank, exhibit.tau.float()
        encoder, head = (ratios(tau[:, part]) for part in (bank.encoder, bank.head))
        cosine = cosines(tau[:, bank.encoder])
        found = []
        for site, e, h, c in zip(exhibit.names, encoder.tolist(), head.tolist(), cosine.tolist(), strict=True):
            excess = max(e / self.most, h / self.most, 1 + self.least_cosine - c)
            said = f"encoder {e:.2g} and head {h:.2g} times as far from theta_0 as the others; most {self.most:g}; cosine {c:+.2f}"
            found.append(Finding(site, self.kind(), max(e, h), self.most, excess, said))
        return found


def ratios(tau: Tensor) -> Tensor:
    """|tau_k| over the others' median, (K,)."""
    return over_others(torch.linalg.vector_norm(tau, dim=1).clamp(min=1e-12))


def cosines(tau: Tensor) -> Tensor:
    """Cosine between tau_k and the sum of the others' directions, (K,)."""
    unit = torch.nn.functional.normalize(tau, dim=1)
    return torch.nn.functional.cosine_similarity(unit, unit.sum(0) - unit, dim=1)
