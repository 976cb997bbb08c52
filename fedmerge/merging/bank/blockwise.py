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
    """What a bank would take, by which methods say how much memory they need.

    Attributes
    ----------
    experts : int
        K.
    parameters : int
        P.
    largest : int
        Parameters of the largest tensor.
    gram : int
        Elements of one site's Gram matrices.

    Examples
    --------
    >>> from fedmerge.merging.bank.blockwise import Sizes
    >>> from fedmerge.merging.methods._base import load_method
    >>> load_method("tsv_m").working_bytes(Sizes(experts=3, parameters=5_700_000, largest=589_824, gram=0)) // 2**20  # MiB
    40
    """

    experts: int
    parameters: int
    largest: int
    gram: int


def pieces(bank: Bank) -> Iterator[slice]:
    """All P columns in order, a block at a time; what is on a disk is released after each block.

    Parameters
    ----------
    bank : Bank
        The experts.

    Yields
    ------
    slice
        The next columns, as a slice of range(P).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.bank.blockwise import pieces
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [4.0, -1.0], [2.0, 3.0]))
    >>> bank = Bank.of(model, {"axial": a, "coronal": b}, start)
    >>> list(pieces(bank))  # a small bank is one piece
    [slice(0, 2, None)]
    """
    column = bank.K * bank.like.element_size()
    step = block(bank.like, bank.K) if bank.resident is None else max(1, bank.resident // (column * COPIES))
    for start in range(0, bank.P, step):
        columns = slice(start, min(start + step, bank.P))
        yield columns
        bank.read(column * (columns.stop - columns.start))


def columnwise(bank: Bank, rule: Callable[[slice], Tensor]) -> Tensor:
    """Merge by a rule that looks at every column by itself.

    Parameters
    ----------
    bank : Bank
        The experts.
    rule : Callable[[slice], Tensor]
        Takes the columns as a slice, and returns their merged values (width,).

    Returns
    -------
    Tensor
        Merged parameters (P,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.bank.blockwise import columnwise
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [4.0, -1.0], [2.0, 3.0]))
    >>> bank = Bank.of(model, {"axial": a, "coronal": b}, start)
    >>> columnwise(bank, lambda columns: bank.columns(columns).amax(0))
    tensor([4., 3.])
    """
    out = bank.blank()
    for columns in pieces(bank):
        found = rule(columns)
        if found.dtype != out.dtype:
            out = out.to(found.dtype)
        out[columns] = found
    return out


def tensorwise(bank: Bank, rule: Callable[[str, Tensor, Tensor], None]) -> Tensor:
    """Merge by a rule for each tensor of the model.

    Parameters
    ----------
    bank : Bank
        The experts.
    rule : Callable[[str, Tensor, Tensor], None]
        Takes the tensor's name, the experts' values (K, d) and the merged values (d,), which it writes into; values are at least
        float32, and no copy where the bank's rows are that.

    Returns
    -------
    Tensor
        Merged parameters (P,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.bank.blockwise import tensorwise
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [4.0, -1.0], [2.0, 3.0]))
    >>> bank = Bank.of(model, {"axial": a, "coronal": b}, start)
    >>> def largest(name, values, merged):
    ...     merged.copy_(values.amax(0))
    >>> tensorwise(bank, largest)
    tensor([4., 3.])
    """
    out = bank.blank(bank.wide)
    for name, columns in bank.slices.items():
        rows = bank.thetas(columns)
        rule(name, rows, out[columns])
        bank.read(rows.numel() * bank.like.element_size())
    return out


def neighbors(bank: Bank) -> Iterator[tuple[list[str], Tensor, slice]]:
    """Tensors of the model in order, as many together as have no more columns than the largest.

    Parameters
    ----------
    bank : Bank
        The experts.

    Yields
    ------
    tuple[list[str], Tensor, slice]
        Names of neighbors, the experts' values of all of them (K, width), at least float32, and their columns.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.bank.blockwise import neighbors
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Linear(1, 1))
    >>> bank = Bank.of(model, {"axial": model.state_dict(), "coronal": model.state_dict()})
    >>> [names for names, _, _ in neighbors(bank)]
    [['0.weight'], ['0.bias', '1.weight'], ['1.bias']]
    """
    largest = max(columns.stop - columns.start for columns in bank.slices.values())
    groups: list[list[str]] = []
    start = -largest
    for name, columns in bank.slices.items():
        if columns.stop - start > largest:
            groups.append([])
            start = columns.start
        groups[-1].append(name)
    for names in groups:
        at = slice(bank.slices[names[0]].start, bank.slices[names[-1]].stop)
        rows = bank.thetas(at)
        yield names, rows, at
        bank.read(rows.numel() * bank.like.element_size())


def tauwise(bank: Bank, rule: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Merge by a rule for the task vectors of each tensor of the model.

    Parameters
    ----------
    bank : Bank
        The experts, with theta_0.
    rule : Callable[[str, Tensor], Tensor]
        Takes the tensor's name and the task vectors (K, d), which it may write over, and returns the merged one (d,).

    Returns
    -------
    Tensor
        Merged task vector (P,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.bank.blockwise import tauwise
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [4.0, -1.0], [2.0, 3.0]))
    >>> bank = Bank.of(model, {"axial": a, "coronal": b}, start)
    >>> tauwise(bank, lambda name, tau: tau.sum(0))
    tensor([6., 2.])
    """
    theta_0 = bank.anchor_row("theta_0").to(bank.wide)
    room = theta_0.new_empty(bank.K * max(shape.numel() for shape in bank.shapes.values()))  # fresh memory costs more than the sums

    def one(name: str, rows: Tensor, out: Tensor) -> None:
        tau = torch.sub(rows, theta_0[bank.slices[name]], out=room[: rows.numel()].view(rows.shape))
        out.copy_(rule(name, tau))

    return tensorwise(bank, one)


RUN = 512
"""Products of float32 that are summed in float32: so few that their sum is as good as one of float64 rounded."""


def inner_products(rows: Tensor, origin: Tensor | None = None) -> Tensor:
    """Inner products of K vectors in each of R groups.

    A block at a time; sums of `RUN` products are added up in float64, so that the error stays that of one rounding.

    Parameters
    ----------
    rows : Tensor
        The vectors (K, R, d).
    origin : Tensor, optional
        A point (R, d) that is subtracted from each vector first; default: nothing is.

    Returns
    -------
    Tensor
        G (R, K, K), float64.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.blockwise import inner_products
    >>> rows = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])  # two vectors, one group
    >>> inner_products(rows)
    tensor([[[1., 1.],
             [1., 2.]]], dtype=torch.float64)
    """
    K, R, d = rows.shape
    G = torch.zeros(R, K, K, dtype=torch.float64, device=rows.device)
    step = min(8 * block(rows, K), RUN * max(1, 2**24 // K**2))  # blocks of a few MB: more calls cost more than the cache saves
    across = max(1, step // max(d, 1))
    room = None if origin is None else rows.new_empty(K * step)  # one for all blocks: fresh memory costs more than the sums
    for r in range(0, R, across):
        for c in range(0, d, step):
            x = rows[:, r : r + across, c : c + step]
            if origin is not None and room is not None:
                point = origin[r : r + across, c : c + step]
                x = torch.sub(x, point, out=room[: x.numel()].view(x.shape))
            whole = x.shape[2] // RUN * RUN
            if whole:
                runs = x[:, :, :whole].view(K, x.shape[1], -1, RUN).flatten(1, 2).transpose(0, 1)
                G[r : r + across] += (runs @ runs.mT).view(x.shape[1], -1, K, K).sum(1, dtype=torch.float64)
            if whole < x.shape[2]:
                rest = x[:, :, whole:].transpose(0, 1)
                G[r : r + across] += rest @ rest.mT
    return G


def block(like: Tensor, rows: int) -> int:
    """Columns of so many rows that are worked on at a time: what fits into the cache of a CPU, or much on a GPU.

    A multiple of 1024: torch sums the columns that are over after the last full vectors in another order, and these are then the
    last of all columns, as if there were one piece.

    Parameters
    ----------
    like : Tensor
        Any tensor (...) of the rows' dtype and device.
    rows : int
        Rows that are worked on at once.

    Returns
    -------
    int
        Number of columns, a multiple of 1024.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.blockwise import block
    >>> block(torch.zeros(1), rows=2) % 1024
    0
    """
    return max(2**12, BLOCK // (4 * rows) // 1024 * 1024) if like.device.type == "cpu" else 2**24
