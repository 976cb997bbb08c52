"""Task vectors trimmed, given one sign, and merged where they agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from pydantic import AliasChoices, Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import pieces
from fedmerge.merging.bank.ranks import magnitude_of_rank
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

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [4.0, -1.0], [2.0, 3.0]))
    >>> fedmerge.merge(model, [a, b], "ties", base=start, keep=1)["weight"]
    tensor([[0.9000, 0.9000]])
    """

    paper: ClassVar[str] = "Yadav et al., TIES-merging, NeurIPS 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    keep: float = Field(0.2, ge=0, le=1, validation_alias=KEEP, description="share of every task vector that trimming keeps")
    combine: Literal["mean", "sum"] = Field("mean", description="how entries of the elected sign are merged")
    scale: float = Field(0.3, ge=0, le=2, description="s, the scale of the merged task vector")

    def rule(self, bank: Bank) -> Tensor:
        """(P,), block by block, so that beside the result little more than one task vector is in memory at once."""
        floor = bank.each(self._least)
        trimmed = ((columns, above(bank.taus(columns), floor)) for columns in pieces(bank))
        return by_sign(bank, trimmed, self.combine, self.scale)

    def _least(self, name: str, tau: Tensor) -> Tensor:
        return threshold(tau, self.keep)


def trim(tau: Tensor, keep: float) -> Tensor:
    """A task vector with 0 in place of its smallest entries.

    Parameters
    ----------
    tau : Tensor
        (P,).
    keep : float
        Share of the entries that stay, in [0, 1].

    Returns
    -------
    Tensor
        (P,).

    References
    ----------
    Yadav et al., TIES-merging, NeurIPS 2023, algorithm 1; the rank is that of the authors' code.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.ties import trim
    >>> trim(torch.tensor([0.1, -4.0, 2.0, 0.3]), keep=0.25)
    tensor([ 0., -4.,  2.,  0.])
    """
    return above(tau.clone()[None], threshold(tau, keep)[None])[0]


def threshold(tau: Tensor, keep: float) -> Tensor:
    """The smallest magnitude that survives the trimming: that of rank P - int(keep P), counted from the smallest.

    Parameters
    ----------
    tau : Tensor
        (P,).
    keep : float
        Share of the entries that stay, in [0, 1].

    Returns
    -------
    Tensor
        A scalar tensor.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.ties import threshold
    >>> threshold(torch.tensor([0.1, -4.0, 2.0, 0.3]), keep=0.25)
    tensor(2.)
    """
    return magnitude_of_rank(tau, max(1, len(tau) - int(keep * len(tau))))


def above(tau: Tensor, floor: Tensor) -> Tensor:
    """Set to 0 what is below a floor, in place.

    Parameters
    ----------
    tau : Tensor
        (K, width), which is overwritten.
    floor : Tensor
        (K,), not negative.

    Returns
    -------
    Tensor
        tau.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.ties import above
    >>> above(torch.tensor([[0.1, -4.0, 2.0]]), floor=torch.tensor([1.0]))
    tensor([[ 0., -4.,  2.]])
    """
    under = torch.nextafter(floor, torch.full_like(floor, -torch.inf))  # hardshrink drops what is at its limit, too
    for row, limit in zip(tau, under.tolist(), strict=True):
        torch.hardshrink(row, limit, out=row)
    return tau


def by_sign(bank: Bank, parts: Iterable[tuple[slice, Tensor]], combine: str, scale: float) -> Tensor:
    """theta_0 + s tau*, tau* by electing signs and merging trimmed task vectors that come in parts.

    One pass: where entries cancel out, they take the sign of most parameters, which is known only in the end. Until then both
    possible values are kept.

    Parameters
    ----------
    bank : Bank
        The experts, with theta_0.
    parts : Iterable[tuple[slice, Tensor]]
        Columns with their trimmed task vectors (K, width), in order.
    combine : str
        Mean or sum.
    scale : float
        s, 0 or more.

    Returns
    -------
    Tensor
        Merged parameters (P,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.methods.ties import by_sign
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([1.0, 1.0], [5.0, 0.0], [3.0, 4.0]))
    >>> bank = Bank.of(model, [a, b], start)
    >>> by_sign(bank, [(slice(0, 2), bank.tau)], combine="mean", scale=1.0)
    tensor([4., 4.])
    """
    theta_0 = bank.anchor_row("theta_0")
    out = bank.blank(bank.wide)
    majority, undecided = 0, []
    for columns, tau in parts:
        gamma = tau.sum(0).sign()
        majority += int(gamma.sum(dtype=torch.float64))
        cancels = (1 - gamma.abs()) * tau.amax(0)  # a sum of 0 with a positive entry
        if cancels.amax() > 0:
            at = (cancels > 0).nonzero()[:, 0]
            values = [agreeing(tau[:, at], gamma.new_tensor(sign), combine) for sign in (0.0, 1.0, -1.0)]
            undecided.append((at + columns.start, values))
        torch.add(theta_0[columns], agreeing(tau, gamma, combine).mul_(scale), out=out[columns])
    for at, values in undecided:
        out[at] = theta_0[at] + scale * values[(majority > 0) - (majority < 0)]
    return out


def disjoint_merge(tau: Tensor, combine: str) -> Tensor:
    """Elect a sign for each parameter, and merge the entries of that sign.

    Parameters
    ----------
    tau : Tensor
        (K, P).
    combine : str
        Mean or sum.

    Returns
    -------
    Tensor
        (P,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.ties import disjoint_merge
    >>> disjoint_merge(torch.tensor([[4.0, -1.0], [2.0, 3.0]]), "mean").tolist()
    [3.0, 3.0]
    """
    return agreeing(tau, elected(tau.sum(0)), combine)


def elected(total: Tensor) -> Tensor:
    """The elected sign of each parameter; where experts cancel out, the sign of most parameters.

    Parameters
    ----------
    total : Tensor
        Sum of the task vectors over experts (P,).

    Returns
    -------
    Tensor
        gamma (P,), in {-1, 0, 1}.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.ties import elected
    >>> elected(torch.tensor([6.0, 0.0, 2.0, -1.0]))
    tensor([ 1.,  1.,  1., -1.])
    """
    gamma = total.sign()
    return torch.where(gamma == 0, gamma.sum().sign(), gamma)


def agreeing(tau: Tensor, gamma: Tensor, combine: str) -> Tensor:
    """Merge the entries of the elected sign; 0 where there is none.

    Parameters
    ----------
    tau : Tensor
        (K, P).
    gamma : Tensor
        The elected signs (P,).
    combine : str
        Mean or sum.

    Returns
    -------
    Tensor
        (P,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.ties import agreeing
    >>> tau = torch.tensor([[4.0, -1.0], [2.0, 3.0]])
    >>> agreeing(tau, gamma=torch.tensor([1.0, -1.0]), combine="mean")
    tensor([ 3., -1.])
    """
    along = (tau * gamma).clamp_(min=0)  # magnitudes of those that agree
    total = along.sum(0) * gamma
    return total / along.sign_().sum(0).clamp_(min=1) if combine == "mean" else total
