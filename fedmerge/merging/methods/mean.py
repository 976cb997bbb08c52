"""The uniform mean of the experts' weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.methods._base import Static


class Mean(Static):
    """theta = (1/K) sum_k theta_k.

    Worked example: experts (1, 4) and (3, 0) give (2, 2).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> a, b = ({"weight": torch.tensor([row])} for row in ([1.0, 4.0], [3.0, 0.0]))
    >>> fedmerge.merge(model, [a, b], "mean")["weight"]
    tensor([[2., 2.]])
    """

    paper: ClassVar[str] = "Wortsman et al., Model soups, ICML 2022; one-shot FedAvg with equal weights"

    def rule(self, bank: Bank) -> Tensor:
        """The mean of the rows (P,)."""
        return bank.mix(torch.full((bank.K,), 1 / bank.K, dtype=torch.float64), out=bank.blank())
