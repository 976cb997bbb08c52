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
    out = torch.empty(bank.P, dtype=bank.wide, device=bank.like.device)
    for name, columns in bank.slices.items():
        rows = bank.thetas(columns)
        rule(name, rows, out[columns])
        bank.read(rows.numel() * bank.like.element_size())
    return out


def tauwise(bank: Bank, rule: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Merge by a rule for the task vectors of each tensor of the model.

    Parameters
    ----------
    bank : Bank
        The experts, with theta_0.
    rule : Callable[[str, Tensor], Tensor]
        Takes the tensor's name and the task vectors (K, d), and returns the merged one (d,).

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

    def one(name: str, rows: Tensor, out: Tensor) -> None:
        out.copy_(rule(name, rows - theta_0[bank.slices[name]]))

    return tensorwise(bank, one)


def inner_products(rows: Tensor, origin: Tensor | None = None) -> Tensor:
    """Inner products of K vectors in each of R groups.

    In float64, a block at a time: the vectors may differ by so little that float32 would lose the angle.

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
    """The magnitude of a given rank among the entries of a vector.

    Exact, and in one pass: every n^(1/3)-th entry tells between which two magnitudes it lies but for one case in 10,000, and only
    what is there has to be ordered.

    Parameters
    ----------
    tau : Tensor
        The vector (n,).
    rank : int
        From 1, the smallest, to n.

    Returns
    -------
    Tensor
        A scalar tensor.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.blockwise import magnitude_of_rank
    >>> magnitude_of_rank(torch.tensor([0.1, -4.0, 2.0, 0.3]), rank=3)
    tensor(2.)
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
    """Mask of the entries whose rank of magnitude lies between two ranks.

    Entries of equal magnitude are ranked in the order of their places.

    Parameters
    ----------
    tau : Tensor
        The vector (n,).
    first : int
        Entries with fewer than this many before them are left out, 0 to n.
    last : int
        Entries after this rank are left out, 0 to n.

    Returns
    -------
    Tensor
        bool (n,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.blockwise import between_ranks
    >>> between_ranks(torch.tensor([0.1, -4.0, 2.0, 0.3]), first=1, last=3)
    tensor([False, False,  True,  True])
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
