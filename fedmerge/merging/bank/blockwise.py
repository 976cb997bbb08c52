"""What static rules do with all experts at once, gone through in pieces, so that no copy of all of them is made.

Rules about columns get blocks that stay in the cache, on a disk or in shards as many columns as may be resident; rules about
tensors get one tensor at a time. The pieces' results are those of the whole, but for the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.row_storage import BLOCK

COPIES = 6
"""Tensors of a piece's size that an elementwise rule holds at the same time, at most."""


@dataclass(frozen=True)
class Sizes:
    """What a bank would take: K experts, P parameters, those of the largest tensor, and elements of one site's Gram matrices."""

    experts: int
    parameters: int
    largest: int
    gram: int


def pieces(bank: Bank) -> Iterator[slice]:
    """All P columns in order, a block at a time; what is on a disk is let go of after each."""
    column = bank.K * bank.like.element_size()
    step = block(bank.like, bank.K) if bank.resident is None else max(1, bank.resident // (column * COPIES))
    for start in range(0, bank.P, step):
        columns = slice(start, min(start + step, bank.P))
        yield columns
        bank.read(column * (columns.stop - columns.start))


def columnwise(bank: Bank, rule: Callable[[slice], Tensor]) -> Tensor:
    """(P,) by a rule that looks at every column by itself: rule(columns) -> (width,)."""
    out = bank.blank()
    for columns in pieces(bank):
        found = rule(columns)
        if found.dtype != out.dtype:
            out = out.to(found.dtype)
        out[columns] = found
    return out


def tensorwise(bank: Bank, rule: Callable[[str, Tensor, Tensor], None]) -> Tensor:
    """(P,) by a rule for each tensor of the model, which writes into `out`: rule(name, experts (K, d), out (d,)).

    experts: at least float32, and no copy where the bank's rows are that.
    """
    out = torch.empty(bank.P, dtype=bank.wide, device=bank.like.device)
    for name, columns in bank.slices.items():
        rows = bank.thetas(columns)
        rule(name, rows, out[columns])
        bank.read(rows.numel() * bank.like.element_size())
    return out


def tauwise(bank: Bank, rule: Callable[[str, Tensor], Tensor]) -> Tensor:
    """(P,) by a rule for the task vectors of each tensor of the model: rule(name, tau (K, d)) -> (d,)."""
    theta_0 = bank.anchor_row("theta_0").to(bank.wide)

    def one(name: str, rows: Tensor, out: Tensor) -> None:
        out.copy_(rule(name, rows - theta_0[bank.slices[name]]))

    return tensorwise(bank, one)


def inner_products(rows: Tensor, origin: Tensor | None = None) -> Tensor:
    """G (R, K, K) float64, of rows (K, R, d): the inner products of K vectors in each of R groups, those from an origin (R, d).

    In float64, a block at a time: what it is made of may differ by so little that float32 would lose the angle.
    """
    K, R, d = rows.shape
    G = torch.zeros(R, K, K, dtype=torch.float64, device=rows.device)
    step = block(rows, 2 * K)
    across = max(1, step // max(d, 1))
    room = rows.new_empty(K * step, dtype=torch.float64)  # one for all blocks: fresh memory costs more than the sums
    for r in range(0, R, across):
        for c in range(0, d, step):
            part = rows[:, r : r + across, c : c + step]
            x = room[: part.numel()].view(part.shape).copy_(part)
            if origin is not None:
                x -= origin[r : r + across, c : c + step].double()
            if R == 1:
                G[0] += x[:, 0] @ x[:, 0].T
            else:
                x = x.transpose(0, 1)
                G[r : r + across] += x @ x.mT
    return G


SMALL = 2**14
"""Entries that are sorted as they are: a sample of them would save nothing."""


def magnitude_of_rank(tau: Tensor, rank: int) -> Tensor:
    """The magnitude of a rank, 1 for the smallest, among those of tau (n,).

    Exact, and in one pass: every n^(1/3)-th entry tells between which two magnitudes it lies but for one case in 10,000, and only
    what is there has to be ordered.
    """
    n = len(tau)
    if n > SMALL:
        sample = tau[:: int(n ** (1 / 3)) // 2 | 1].abs()  # odd, so that it is no column of most matrices
        place, share = rank / n * len(sample), rank / n
        margin = 4 * (len(sample) * share * (1 - share)) ** 0.5 + 1
        low, high = (_of_rank(sample, min(len(sample), max(1, int(at)))) for at in (place - margin, place + margin))
        below, between = 0, []
        for part in torch.split(tau, block(tau, 2)):
            size = part.abs()
            below += int((size < low).sum())
            between.append(size[(size >= low) & (size <= high)])
        found = torch.cat(between)
        if below < rank <= below + len(found):
            return _of_rank(found, rank - below)
    return _of_rank(tau.abs(), rank)


def _of_rank(values: Tensor, rank: int) -> Tensor:
    return values.kthvalue(rank).values


def between_ranks(tau: Tensor, first: int, last: int) -> Tensor:
    """The mask (n,) of the entries of tau (n,) that `first` and no more have before them in the order of magnitudes, up to the
    `last`; equal ones are in the order of their places.
    """
    size = tau.abs()
    if first >= last:
        return size < 0
    low, high = (magnitude_of_rank(tau, rank) for rank in (first + 1, last))
    mask = (size >= low) & (size <= high)
    early, late = first - int((size < low).sum()), last - int((size < high).sum())  # of those equal to the ends: dropped, and kept
    for edge, dropped in ((low, slice(0, early)), (high, slice(late, None))):
        if dropped != slice(0, 0):
            mask[(size == edge).nonzero()[:, 0][dropped]] = False
    return mask


def block(like: Tensor, rows: int) -> int:
    """Columns of so many rows that are worked on at a time: what fits into the cache of a CPU, or much on a GPU.

    A multiple of 1024: torch sums the columns that are over after the last full vectors in another order, and these are then the
    last of all columns, as if there were one piece.
    """
    return max(2**12, BLOCK // (4 * rows) // 1024 * 1024) if like.device.type == "cpu" else 2**24
