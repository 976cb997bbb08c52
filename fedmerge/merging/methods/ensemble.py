"""The experts' predictions averaged: K models at the target for every batch, and nothing merged."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Output


class Ensemble(Output):
    """p = (1/K) sum_k softmax(z_k), or softmax((1/K) sum_k z_k).

    Where sources differ: Oh et al. (DaWin) average probabilities, Tang et al. (FusionBench) logits; both are here.
    Worked example: p_1 = (0.9, 0.1) and p_2 = (0.5, 0.5) give (0.7, 0.3) from probabilities and (0.75, 0.25) from logits.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> a, b = ({"weight": torch.tensor(p).log()[:, None]} for p in ([0.9, 0.1], [0.5, 0.5]))
    >>> fedmerge.Adapter(model, [a, b], "ensemble")(torch.ones(1, 1)).exp()
    tensor([[0.7000, 0.3000]])
    >>> fedmerge.Adapter(model, [a, b], "ensemble", average="logits")(torch.ones(1, 1)).exp()
    tensor([[0.7500, 0.2500]])
    """

    paper: ClassVar[str] = "Lakshminarayanan et al., Deep ensembles, NeurIPS 2017"
    cost: ClassVar[str] = "K"

    average: Literal["probabilities", "logits"] = Field("probabilities", description="average of probabilities or of logits")

    def predict(self, evidence: Evidence) -> Tensor:
        """Class probabilities (N, C), over the experts whose logits are finite."""
        valid = evidence.valid if bool(evidence.valid.any()) else ~evidence.valid
        log_p = evidence.log_p()[valid]
        if self.average == "logits":
            return log_p.mean(0).softmax(-1)
        return log_p.exp().mean(0)
