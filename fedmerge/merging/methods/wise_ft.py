"""Interpolation between the initialization and the experts' mean."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import columnwise
from fedmerge.merging.methods._base import Static


class WiseFt(Static):
    """theta = (1 - a) theta_0 + a (1/K) sum_k theta_k.

    The paper interpolates between two models; with K experts the second is their mean, which makes this task arithmetic at a
    scale of a / K. Worked example: theta_0 = 0, experts 2 and 4, a = 0.5 give 1.5.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [2.0, 8.0], [4.0, 0.0]))
    >>> fedmerge.merge(model, [a, b], "wise_ft", base=start, a=0.5)["weight"]
    tensor([[1.5000, 2.0000]])
    """

    paper: ClassVar[str] = "Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT), CVPR 2022"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    a: float = Field(0.5, ge=0, le=1, description="a, the share of the experts' mean; theta_0 has the rest")

    def rule(self, bank: Bank) -> Tensor:
        """(P,); theta_0 and nothing else for a = 0, not even the sign of a zero changes."""
        theta_0 = bank.anchor_row("theta_0")
        if self.a == 0:
            return theta_0.clone()
        return columnwise(bank, lambda at: (1 - self.a) * theta_0[at].to(bank.wide) + self.a * bank.thetas(at).mean(0))

    def statistics(self, bank: Bank) -> Tensor:
        """The rule is convex, so BatchNorm statistics follow it: a / K for each expert, and 1 - a for theta_0, (K + A,)."""
        weights = torch.zeros(bank.K + bank.A, dtype=torch.float64)
        weights[: bank.K] = self.a / bank.K
        weights[bank.anchor("theta_0")] = 1 - self.a
        return weights
