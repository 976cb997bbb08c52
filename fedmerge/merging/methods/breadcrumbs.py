"""Task vectors without their largest entries and without their smallest, added."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes, tauwise
from fedmerge.merging.bank.ranks import between_ranks
from fedmerge.merging.methods._base import Static


class Breadcrumbs(Static):
    """theta = theta_0 + s sum_k m_k tau_k; in every tensor m_k is 0 at the largest int(gamma d) and smallest int(beta d) |tau_k|.

    d: entries of the tensor. Entries of equal magnitude are dropped in their order, so that the share is exact.
    Where sources differ: the paper and mergekit mask a tensor as one, as here; the authors' code masks each row of it.
    Worked example: tau = (1, -2, 3, -4), beta = 0.5, gamma = 0.25: m tau = (0, 0, 3, 0).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(4, 1, bias=False)
    >>> start, a = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0, 0.0, 0.0], [1.0, -2.0, 3.0, -4.0]))
    >>> fedmerge.merge(model, [a], "breadcrumbs", base=start, beta=0.5, gamma=0.25, scale=1)["weight"]
    tensor([[0., 0., 3., 0.]])
    """

    paper: ClassVar[str] = "Davari & Belilovsky, Model breadcrumbs, ECCV 2024"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    beta: float = Field(0.85, ge=0, le=1, description="share of the entries of every tensor that is dropped, smallest first")
    gamma: float = Field(0.01, ge=0, le=1, description="share of the entries of every tensor that is dropped, largest first")
    scale: float = Field(0.3, ge=0, le=2, description="s, the scale of every task vector")

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.beta + self.gamma > 1:
            raise ValueError(
                f"beta + gamma is {self.beta + self.gamma:g}: the two shares that are dropped must be 1 at most together"
            )
        return self

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        theta_0 = bank.anchor_row("theta_0")
        return tauwise(bank, lambda name, tau: theta_0[bank.slices[name]] + self.scale * self._crumbs(tau).sum(0))

    def working_bytes(self, sizes: Sizes) -> int:
        """One tensor's task vectors of all experts, and the magnitudes of one of them."""
        return 2 * 4 * sizes.experts * sizes.largest

    def _crumbs(self, tau: Tensor) -> Tensor:
        """m_k tau_k (K, d) of one tensor, written over tau."""
        d = tau.shape[1]
        for row in tau:
            row *= between_ranks(row, int(self.beta * d), d - int(self.gamma * d))
        return tau
