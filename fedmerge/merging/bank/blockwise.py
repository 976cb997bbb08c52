"""What static rules do with all experts at once, so that a bank on disk is gone through in pieces.

Where rows are in memory there is one piece, the whole; on disk, or in shards, as many as keep to what may be resident. The pieces'
results are those of the whole, but for the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.merging.bank.bank import ALL, Bank

COPIES = 6
"""Tensors of a piece's size that an elementwise rule holds at the same time, at most."""


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
