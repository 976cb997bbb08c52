"""Task vectors added to the initialization."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import columnwise
from fedmerge.merging.methods._base import Static


class TaskArithmetic(Static):
    """theta = theta_0 + s sum_k tau_k, tau_k = theta_k - theta_0.

    Equal to (1 - sK) theta_0 + sK mean(theta_k): the default of 0.3 is 0.9 of the mean for K = 3 and extrapolates for K >= 4;
    s = 1/K is the mean. Worked example: theta_0 = 1, experts 2 and 5, s = 0.3 give 1 + 0.3 (1 + 4) = 2.5.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([1.0, 0.0], [2.0, 1.0], [5.0, 1.0]))
    >>> fedmerge.merge(model, [a, b], "task_arithmetic", base=start, scale=0.3)["weight"]
    tensor([[2.5000, 0.6000]])
    """

    paper: ClassVar[str] = "Ilharco et al., Editing models with task arithmetic, ICLR 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    scale: float = Field(0.3, ge=0, le=2, description="s, the scale of every task vector")

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        theta_0 = bank.anchor_row("theta_0")
        return columnwise(bank, lambda columns: theta_0[columns] + self.scale * bank.taus(columns).sum(0))
