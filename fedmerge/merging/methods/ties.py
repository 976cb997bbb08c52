"""Task vectors trimmed, given one sign, and merged where they agree."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import AliasChoices, Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import block, pieces
from fedmerge.merging.methods._base import Static

SAMPLE = 2**18
"""Entries of a task vector that tell about where its threshold lies."""

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
        """(P,), block by block, so that beside the result little more than one task vector is in memory at once."""
        floor, theta_0 = bank.each(self._least)[:, None], bank.anchor_row("theta_0")
        out = torch.empty(bank.P, dtype=bank.wide, device=bank.like.device)
        majority, undecided = 0, []

        def settle(columns: slice, tau: Tensor, gamma: Tensor) -> None:
            torch.add(theta_0[columns], self.scale * agreeing(tau, gamma, self.combine), out=out[columns])

        for columns in pieces(bank):
            tau = above(bank.taus(columns), floor)
            gamma = tau.sum(0).sign()
            majority += int(gamma.sum())
            if bool(((gamma == 0) & (tau != 0)).any()):
                undecided.append(columns)
            settle(columns, tau, gamma)
        for columns in undecided:  # what cancels out exactly takes the sign of most parameters, known only now
            tau = above(bank.taus(columns), floor)
            gamma = tau.sum(0).sign()
            settle(columns, tau, torch.where(gamma == 0, float((majority > 0) - (majority < 0)), gamma))
        return out

    def _least(self, name: str, tau: Tensor) -> Tensor:
        return threshold(tau, self.keep)


def trim(tau: Tensor, keep: float) -> Tensor:
    """tau (P,) with 0 below the magnitude of rank P - int(keep P), counted from the smallest."""
    return above(tau, threshold(tau, keep))


def threshold(tau: Tensor, keep: float) -> Tensor:
    """The magnitude of rank P - int(keep P), counted from the smallest, of tau (P,).

    Exact, and in one pass: a sample tells between which two magnitudes it lies, and only what is there has to be sorted.
    """
    rank = max(1, len(tau) - int(keep * len(tau)))
    if len(tau) > 4 * SAMPLE:
        sample = tau[:: len(tau) // SAMPLE].abs().sort().values
        place, margin = rank / len(tau) * len(sample), 4 * len(sample) ** 0.5
        low = sample[max(0, int(place - margin))]
        high = sample[min(len(sample) - 1, int(place + margin))]
        below, between = 0, []
        for part in torch.split(tau, block(tau, 2)):
            size = part.abs()
            below += int((size < low).count_nonzero())
            between.append(size[(size >= low) & (size <= high)])
        found = torch.cat(between)
        if below < rank <= below + len(found):
            return found.kthvalue(rank - below).values
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
    along = (tau * gamma).clamp_(min=0)  # magnitudes of those that agree
    total = along.sum(0) * gamma
    return total / along.sign_().sum(0).clamp_(min=1) if combine == "mean" else total
