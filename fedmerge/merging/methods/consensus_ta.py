"""Task arithmetic on the parameters that matter to several experts; those that one alone uses stay at the initialization."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import columnwise
from fedmerge.merging.methods._base import Static


class ConsensusTa(Static):
    """theta = theta_0 + s tau [sum_k m_k >= least], tau = sum_k tau_k, m_k = [|tau_k| > lam |tau - tau_k|].

    m_k (the TALL mask) are the parameters where expert k is near the sum; those that no expert needs, or one alone ("selfish"), are
    dropped. With fewer experts than `least` nothing is shared, and theta_0 comes out.
    Where sources differ: the paper writes >=, its code >, which also counts no parameter where nobody moved. The authors choose lam
    for each task from 0.2 to 0.6 on labeled validation images; here it is one number for all.
    Worked example: tau_1 = (4, 1), tau_2 = (2, -3), lam = 0.4: m_1 = (1, 0), m_2 = (1, 1), theta = theta_0 + 0.3 (6, 0).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [4.0, 1.0], [2.0, -3.0]))
    >>> fedmerge.merge(model, [a, b], "consensus_ta", base=start)["weight"]
    tensor([[1.8000, 0.0000]])
    """

    paper: ClassVar[str] = "Wang et al., Localizing task information (Consensus merging), ICML 2024"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    lam: float = Field(
        0.4, gt=0, le=10, description="lam: how much an expert must contribute to a parameter; larger values keep fewer parameters"
    )
    least: int = Field(2, ge=0, description="number of experts that must need a parameter for it to be kept; 0 is task arithmetic")
    scale: float = Field(0.3, ge=0, le=2, description="s, the scale of the task vectors' sum")

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        theta_0 = bank.anchor_row("theta_0")
        return columnwise(bank, lambda at: theta_0[at] + self.scale * self._shared(bank.taus(at)))

    def _shared(self, tau: Tensor) -> Tensor:
        """Task vectors (K, width) -> their sum (width,) where enough experts need it. Written over tau."""
        total = tau.sum(0)
        far = (total - tau).abs_().mul_(self.lam)
        m = tau.abs_().gt_(far)  # 1 and 0 as numbers, which torch compares, sums and multiplies much faster than booleans
        return total * m.sum(0).ge_(self.least)
