"""Dynamic classifier selection: for every image, the expert that is surest of it predicts."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Output


class Dcs(Output):
    """p(x) = p_{k*}(x), k*(x) = argmin_k H_k(x); the lowest k where several tie.

    Worked example: H_1 = 0.2 and H_2 = 0.6 nats: expert 1 predicts this image.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> sure, unsure = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.1, 0.2]))
    >>> adapt = fedmerge.Adapter(model, [sure, unsure], "dcs")
    >>> adapt(torch.ones(1, 1)).exp()  # the surer expert predicts
    tensor([[0.9820, 0.0180]])
    >>> torch.softmax(torch.tensor([2.0, -2.0]), 0)
    tensor([0.9820, 0.0180])
    """

    paper: ClassVar[str] = "Giacinto & Roli, Pattern Recognition 2001; with entropies as in Oh et al., DaWin, ICLR 2025"
    cost: ClassVar[str] = "K"
    needs: ClassVar[frozenset[str]] = frozenset({"temperature"})

    calibrated: bool = Field(True, description="whether logits are first divided by each site's temperature")

    def predict(self, evidence: Evidence) -> Tensor:
        """Class probabilities (N, C)."""
        log_p = evidence.log_p(calibrated=self.calibrated)  # (K, N, C)
        sharpest = evidence.entropies(self.calibrated).argmin(0)  # (N,)
        return log_p[sharpest, torch.arange(log_p.shape[1], device=log_p.device)].exp()
