"""What static rules do with all experts at once, so that a bank on disk is gone through in pieces.

Where rows are in memory there is one piece, the whole; on disk, or in shards, as many as keep to what may be resident. The pieces'
results are those of the whole, but for the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedmerge.merging.bank.bank import Bank

COPIES = 6
"""Tensors of a piece's size that an elementwise rule holds at the same time, at most."""

ALL = slice(None)

Rule = Callable[[str, Tensor], Tensor]
"""What is done with one expert's name and task vector (P,). It travels to where the expert is, so it must be picklable."""


@dataclass(frozen=True)
class Sizes:
    """What a bank would take: K experts, P parameters, those of the largest tensor, and elements of one site's Gram matrices."""

    experts: int
    parameters: int
    largest: int
    gram: int


def columnwise(bank: Bank, rule: Callable[[slice], Tensor]) -> Tensor:
    """(P,) by a rule that looks at every column by itself: rule(columns) -> (width,)."""
    if bank.resident is None:
        return rule(slice(0, bank.P))
    column = bank.K * bank.like.element_size()
    step = max(1, bank.resident // (column * COPIES))
    pieces = []
    for start in range(0, bank.P, step):
        columns = slice(start, min(start + step, bank.P))
        pieces.append(rule(columns))
        bank.read(column * (columns.stop - columns.start))
    return torch.cat(pieces)


def tensorwise(bank: Bank, get: Callable[[slice], Tensor], rule: Callable[[str, Tensor], Tensor]) -> Tensor:
    """(P,) by a rule for each tensor of the model: rule(name, (K, d)) -> (d,). get: columns -> what is merged of them."""
    whole = get(ALL) if bank.resident is None else None
    pieces = []
    for name, columns in bank.slices.items():
        rows = whole[:, columns] if whole is not None else get(columns)
        pieces.append(rule(name, rows))
        bank.read(rows.numel() * rows.element_size())
    return torch.cat(pieces)


def summed(bank: Bank, rule: Rule) -> Tensor:
    """sum_k rule(name_k, tau_k), (P,)."""
    if bank.shards:
        return torch.stack(bank.asked("summed", rule)).sum(0)
    if bank.resident is None:
        return torch.stack([rule(name, tau(bank, k)) for k, name in enumerate(bank.names)]).sum(0)
    total = rule(bank.names[0], tau(bank, 0))
    for k in range(1, bank.K):
        total = total + rule(bank.names[k], tau(bank, k))
        bank.read(bank.P * bank.like.element_size())
    return total


def each(bank: Bank, rule: Rule) -> Tensor:
    """rule(name_k, tau_k) of every expert, stacked: (K,) for a rule that gives one number."""
    if bank.shards:
        return torch.cat(bank.asked("each", rule))
    found = []
    for k, name in enumerate(bank.names):
        found.append(rule(name, tau(bank, k)))
        bank.read(bank.P * bank.like.element_size())
    return torch.stack(found)


def thetas(bank: Bank, columns: slice = ALL, order: Sequence[int] | slice = ALL) -> Tensor:
    """The experts' parameters (K, width), at least float32."""
    return bank.columns(columns).to(_wide(bank))[order]


def taus(bank: Bank, columns: slice = ALL, order: Sequence[int] | slice = ALL) -> Tensor:
    """Task vectors tau_k = theta_k - theta_0 (K, width), at least float32. Raises CheckpointError without theta_0."""
    theta_0 = bank.anchor_row("theta_0")[columns].to(_wide(bank))
    return (bank.columns(columns).to(_wide(bank)) - theta_0)[order]


def tau(bank: Bank, k: int) -> Tensor:
    """One expert's task vector (P,)."""
    return bank.theta[k].to(_wide(bank)) - bank.anchor_row("theta_0").to(_wide(bank))


def _wide(bank: Bank) -> torch.dtype:
    return torch.float64 if bank.like.dtype == torch.float64 else torch.float32
