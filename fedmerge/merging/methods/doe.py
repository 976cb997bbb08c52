"""Dynamic output ensemble: predictions averaged with DaWin's coefficients, and nothing merged."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Output
from fedmerge.merging.methods._expertise import Score, moments, scores, shares, with_offset


class Doe(Output):
    """p(x) = sum_k lambda_k(x) p_k(x), lambda from Eq. 1, or from Eq. 2 on this batch if `offset`.

    Worked example: H = (0, ln 3), p_1 = (1, 0), p_2 = (1/3, 2/3): lambda = (0.75, 0.25) and p = (0.8333, 0.1667).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> sure, unsure = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.1, 0.2]))
    >>> adapt = fedmerge.Adapter(model, [sure, unsure], "doe")
    >>> adapt(torch.ones(1, 1)).exp()
    tensor([[0.8026, 0.1974]])
    """

    paper: ClassVar[str] = "Oh et al., DaWin: Training-free dynamic weight interpolation, ICLR 2025 (dynamic output ensemble)"
    cost: ClassVar[str] = "K"
    needs: ClassVar[frozenset[str]] = frozenset({"temperature"})

    offset: bool = Field(False, description="whether the offset of Eq. 2 is used, from this batch")
    score: Score = Field(
        "entropy", description="how coefficients follow from predictions: Eq. 1, or an alternative of the paper's table D"
    )
    calibrated: bool = Field(True, description="whether logits are first divided by each site's temperature")
    seed: int = Field(1, ge=0, description="seed of scores that are drawn")

    def predict(self, evidence: Evidence) -> Tensor:
        """Class probabilities (N, C)."""
        score = scores(self.score, evidence, self.calibrated, self.seed).cpu()
        rows = with_offset(score, moments({}, evidence.entropies(self.calibrated))) if self.offset else shares(score)
        p = evidence.log_p(calibrated=self.calibrated).exp()
        p = torch.where(evidence.valid[:, None, None], p, 1 / evidence.classes)
        return torch.einsum("nk,knc->nc", rows.to(p), p)
