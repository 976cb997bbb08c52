"""Task vectors trimmed, given one sign, and merged where they agree."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import AliasChoices, Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import columnwise
from fedmerge.merging.methods._base import Static

KEEP = AliasChoices("keep", "density")
"""Names that the share may be given by: ours, and that of mergekit."""


class Ties(Static):
    """theta = theta_0 + s tau*, tau* from trim, elect sign, disjoint merge.

    trim: of the P entries of tau_k the int(keep P) + 1 largest in magnitude stay (all that tie with the last of them), as in the
    authors' code. elect: gamma = sign(sum_k tau_k), and where that is 0 the sign of most parameters.
    merge: the mean (or sum) of the entries whose sign is gamma; 0 where there is none.

    Where sources differ: the paper takes the mean, FusionBench's default the sum; both are here.
    Worked example: theta_0 = 0, keep = 1, tau_1 = (4, -1), tau_2 = (2, 3): gamma = (+, +), tau* = (3, 3), theta = (0.9, 0.9).
    """

    paper: ClassVar[str] = "Yadav et al., TIES-merging, NeurIPS 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    keep: float = Field(0.2, ge=0, le=1, validation_alias=KEEP, description="share of every task vector that survives the trimming")
    combine: Literal["mean", "sum"] = Field("mean", description="how entries of the elected sign are merged")
    scale: float = Field(0.3, ge=0, le=2, description="s, the scale of the merged task vector")

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        floor = bank.each(self._least)[:, None]

        def trimmed(columns: slice) -> Tensor:
            return above(bank.taus(columns), floor)

        gamma = elected(columnwise(bank, lambda columns: trimmed(columns).sum(0)))
        merged = columnwise(bank, lambda columns: agreeing(trimmed(columns), gamma[columns], self.combine))
        return bank.anchor_row("theta_0") + self.scale * merged

    def _least(self, name: str, tau: Tensor) -> Tensor:
        return threshold(tau, self.keep)


def trim(tau: Tensor, keep: float) -> Tensor:
    """tau (P,) with 0 below the magnitude of rank P - int(keep P), counted from the smallest."""
    return above(tau, threshold(tau, keep))


def threshold(tau: Tensor, keep: float) -> Tensor:
    """The magnitude of rank P - int(keep P), counted from the smallest, of tau (P,)."""
    rank = max(1, len(tau) - int(keep * len(tau)))
    return tau.abs().kthvalue(rank).values


def above(tau: Tensor, floor: Tensor) -> Tensor:
    """tau with 0 where its magnitude is below the floor."""
    return torch.where(tau.abs() >= floor, tau, 0)


def disjoint_merge(tau: Tensor, combine: str) -> Tensor:
    """Entries of the elected sign, merged: tau (K, P) -> (P,)."""
    return agreeing(tau, elected(tau.sum(0)), combine)


def elected(total: Tensor) -> Tensor:
    """gamma (P,), the sign of the sum over experts (P,); where that is 0 the sign of most parameters."""
    gamma = total.sign()
    return torch.where(gamma == 0, gamma.sum().sign(), gamma)


def agreeing(tau: Tensor, gamma: Tensor, combine: str) -> Tensor:
    """Mean or sum of the entries of tau (K, P) whose sign is gamma (P,)."""
    same = (tau.sign() == gamma) & (tau != 0)
    total = (tau * same).sum(0)
    return total / same.sum(0).clamp(min=1) if combine == "mean" else total
