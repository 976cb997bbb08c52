"""The rows of a bank, filled one state at a time, in memory or in a file of which only a part is resident at any moment, and
their weighted sums, which every linear merge is, without a copy of any of them."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fedmerge.errors import CheckpointError
from fedmerge.merging.bank.buffers import Buffers
from fedmerge.merging.bank.layout import Parts, StateDict, check_state


class Mapped:
    """Rows (R, P) in a file without a name, which is gone when this process ends, however it ends.

    Parameters
    ----------
    rows : int
        R.
    columns : int
        P.
    dtype : torch.dtype
        Of the numbers.
    folder : Path
        Where the file lies.
    resident : int
        Bytes that may be read before the pages are given back; the system may keep them cached, and drop them at will.

    Raises
    ------
    OSError
        If the folder has no room for the whole file.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.row_storage import Mapped
    >>> from pathlib import Path
    >>> from tempfile import gettempdir
    >>> mapped = Mapped(rows=2, columns=3, dtype=torch.float32, folder=Path(gettempdir()), resident=2**20)
    >>> mapped.tensor.shape
    torch.Size([2, 3])
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, folder: Path, resident: int) -> None:
        size = rows * columns * dtype.itemsize
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, and not a signal when a page is written
            self._map = mmap.mmap(file.fileno(), size)
        self.tensor = torch.frombuffer(self._map, dtype=dtype).view(rows, columns)
        self.resident, self._read = resident, 0

    def read(self, count: int) -> None:
        """Note that so many bytes have been touched; past the limit all pages are given back."""
        self._read += count
        if self._read >= self.resident:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read = 0


class Shelf:
    """Rows for K experts and A anchors. Each state is checked and flattened when it comes, and not kept.

    Parameters
    ----------
    model : nn.Module
        The architecture that every state fits.
    rows : int
        K + A.
    head : tuple[str, ...], optional
        Names of the classifier's parameters; default: they are looked for.
    device : torch.device | str, optional
        Where the rows are; default: the CPU.
    dtype : torch.dtype, default torch.float32
        Of the rows.
    mapped : Mapped, optional
        A file that holds the rows; default: memory.

    Raises
    ------
    CheckpointError
        If a state does not fit the model or holds a NaN.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.bank.row_storage import Shelf
    >>> shelf = Shelf(torch.nn.Linear(1, 2, bias=False), rows=2)
    >>> for name, value in (("axial", 1.0), ("coronal", 3.0)):
    ...     shelf.add(name, {"weight": torch.full((2, 1), value)})
    >>> Bank.on(shelf, ["axial", "coronal"]).theta
    tensor([[1., 1.],
            [3., 3.]])
    """

    def __init__(
        self,
        model: nn.Module,
        rows: int,
        *,
        head: tuple[str, ...] | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        mapped: Mapped | None = None,
    ) -> None:
        self.model, self.mapped = model, mapped
        self.parts = Parts.of(model, head)
        width = sum(model.get_parameter(name).numel() for name in (*self.parts.encoder, *self.parts.head))
        self.rows = mapped.tensor if mapped else _rows(rows, width, dtype, device)
        self._wanted = model.state_dict()
        self._tables: list[dict[str, Tensor]] = []
        self._filled = 0

    def add(self, name: str, state: StateDict) -> None:
        """The next row, experts before anchors."""
        check_state(state, self._wanted, name)
        limit = torch.finfo(self.rows.dtype).max
        for key, tensor in state.items():
            if tensor.dtype == torch.float64 and bool((tensor.abs() > limit).any()):
                found, expected = f"numbers above {limit:.2g}", f"values of {self.rows.dtype}"
                raise CheckpointError(f"{name} does not fit the model:\n  values of {key}: found {found}, expected {expected}")
        row = self.rows[self._filled]
        row.copy_(flatten(state, self.parts, self.rows.device, self.rows.dtype))
        self._filled += 1
        self.add_beside(state)
        if self.mapped:
            self.mapped.read(row.numel() * row.element_size())

    def add_beside(self, state: StateDict) -> None:
        """Only what the next state holds beside parameters; its row is elsewhere."""
        self._tables.append({name: state[name].clone() for name in self.parts.beside})

    def buffers(self, experts: int, policy: str) -> Buffers:
        """What the states hold beside parameters. Raises CheckpointError if a table differs between them."""
        return Buffers.of(self._tables, experts, self.parts, self.rows, policy)


ALIGNED = 64
"""A GPU multiplies fast only with matrices that begin at multiples of so many numbers, or fewer."""


def _rows(count: int, width: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    room = torch.empty(0, device=device)
    padded = -(-width // ALIGNED) * ALIGNED if room.is_cuda else width
    return torch.empty(count, padded, dtype=dtype, device=room.device)[:, :width]


def flatten(state: StateDict, parts: Parts, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
    """The parameters of a state dict as one row, encoder first.

    Parameters
    ----------
    state : StateDict
        The state dict.
    parts : Parts
        Names of the encoder's and the head's parameters.
    device : torch.device | str | None
        Where the row is to be; None leaves it where the tensors are.
    dtype : torch.dtype
        Of the row.

    Returns
    -------
    Tensor
        (P,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.layout import Parts
    >>> from fedmerge.merging.bank.row_storage import flatten
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> flatten({"weight": torch.tensor([[1.0], [2.0]])}, Parts.of(model), device=None, dtype=torch.float64)
    tensor([1., 2.], dtype=torch.float64)
    """
    names = (*parts.encoder, *parts.head)
    return torch.cat([state[name].detach().reshape(-1).to(device=device, dtype=dtype) for name in names])


BLOCK = 2**19
"""Columns that a merge on a CPU sums at a time."""

CUDA_BLOCK = 2**22
"""The same on a GPU, whose cache holds more."""


FLOAT_BYTES = 4


Add = Callable[[Tensor | Sequence[Tensor], Tensor, Tensor, Callable[[int], None]], Tensor]
"""`weighted_sum`, or a `RunningSum`."""


def weighted_sum(
    rows: Tensor | Sequence[Tensor], weights: Tensor, out: Tensor, read: Callable[[int], None] = lambda _: None
) -> Tensor:
    """Add weighted rows: out = sum_k weights_k rows_k, reading only rows of weight other than 0.

    Block by block: the partial sum stays in the cache, so that memory is read once for each row and written once.
    Sums of half precision are float32, and rounded once.

    Parameters
    ----------
    rows : Tensor | Sequence[Tensor]
        (K, P), or K of (P,).
    weights : Tensor
        (K,).
    out : Tensor
        (P,), which is overwritten.
    read : Callable[[int], None], optional
        Called with the bytes of rows that have been read, after each block.

    Returns
    -------
    Tensor
        out.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.row_storage import weighted_sum
    >>> rows = torch.tensor([[0.0, 4.0], [8.0, 0.0]])
    >>> weighted_sum(rows, torch.tensor([0.75, 0.25]), out=torch.empty(2))
    tensor([2., 3.])
    """
    used = [(k, weight) for k, weight in enumerate(weights.tolist()) if weight != 0]
    if not used:
        return out.zero_()
    if len(used) == 1 and used[0][1] == 1:
        return out.copy_(rows[used[0][0]])
    step = BLOCK if out.device.type == "cpu" else CUDA_BLOCK
    wide = out.new_empty(min(step, len(out)), dtype=torch.float32) if out.dtype.itemsize < FLOAT_BYTES else None
    for start in range(0, len(out), step):
        block = out[start : start + step]
        total = block if wide is None else wide[: len(block)].zero_()
        for number, (k, weight) in enumerate(used):
            part = rows[k][start : start + step]
            if number == 0 and wide is None:
                torch.mul(part, weight, out=total)
            else:
                total.add_(part, alpha=weight)
        if wide is not None:
            block.copy_(total)
        read(len(used) * len(block) * block.element_size())
    return out


MANY = 64
"""Rows of whom a sum is worth keeping."""

SAME = 1e-9
"""Relative difference of weights up to which a row is left as it is in a sum."""

CORRECTIONS = 32
"""After so many a sum is made anew: each leaves a rounding of float32 of what it adds."""


class RunningSum:
    """Weighted sums of many rows, one after another. Where most weights are those of the sum before times one factor, that sum is
    multiplied by the factor, and only the others' rows are read: a thousand experts are merged for a batch that a few have seen.

    A sum's bits hang on its weights and on `past` alone: who goes on from there later, with the same rows, gets the same.

    Parameters
    ----------
    past : Tensor, optional
        (n, K), weights of the sums since one was made anew; default: none.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.row_storage import RunningSum
    >>> rows, add, read = torch.ones(100, 3), RunningSum(), []
    >>> weights = torch.full((100,), 0.01)
    >>> for first in (0.01, 0.02, 0.03, 0.04):
    ...     weights[0] = first
    ...     total = add(rows, weights, torch.empty(3), read.append)
    >>> total, read  # bytes; the second one tells that a sum is worth keeping
    (tensor([1.0300, 1.0300, 1.0300]), [1200, 1200, 12, 12, 12])
    """

    def __init__(self, past: Tensor | None = None) -> None:
        self.past: list[Tensor] = [] if past is None else [*past.double()]
        self._weights = self.past[0] if self.past else torch.empty(0)  # those of the sum as it is
        self._total: Tensor | None = None  # in float64; None until a sum is near the one before
        for weights in self.past[1:]:
            self._weights = _corrected(self._weights, weights)[2]

    def at(self, past: Tensor | None) -> RunningSum:
        """This one if it has come from there, and otherwise one that goes on from there."""
        own = torch.stack(self.past) if self.past else None
        same = past is own if past is None or own is None else torch.equal(past, own)
        return self if same else RunningSum(past)

    def __call__(
        self, rows: Tensor | Sequence[Tensor], weights: Tensor, out: Tensor, read: Callable[[int], None] = lambda _: None
    ) -> Tensor:
        """out (P,) = sum_k weights_k rows_k, as `weighted_sum` has it, up to rounding."""
        weights = weights.detach().to("cpu", torch.float64, copy=True)  # whoever gave them may write over them
        used, largest = int((weights != 0).sum()), partial(torch.linalg.vector_norm, ord=math.inf)
        if used < MANY or out.dtype.itemsize < FLOAT_BYTES:
            self.past, self._weights, self._total = [], torch.empty(0), None
            return weighted_sum(rows, weights, out, read)
        if len(self._weights) == len(weights) and len(self.past) <= CORRECTIONS:
            c, d, after = _corrected(self._weights, weights)
            if int((d != 0).sum()) <= used // 2:
                total = self._replayed(rows, out, read) if self._total is None else self._total
                weighted_sum(rows, d, out, read)
                total.mul_(c).add_(out)
                if bool(largest(out) <= largest(total)):  # else the rounding of what was taken away would show; or it is NaN
                    self.past, self._weights, self._total = [*self.past, weights], after, total
                    return out.copy_(total)
        weighted_sum(rows, weights, out, read)
        self._total = out.double() if len(self.past) > 1 else None
        self.past, self._weights = [weights], weights
        return out

    def _replayed(self, rows: Tensor | Sequence[Tensor], room: Tensor, read: Callable[[int], None]) -> Tensor:
        """The sum as it is, from what is known of the past."""
        before = self.past[0]
        total = weighted_sum(rows, before, room, read).double()
        for weights in self.past[1:]:
            c, d, before = _corrected(before, weights)
            total.mul_(c).add_(weighted_sum(rows, d, room, read))
        return total


def _corrected(before: Tensor, weights: Tensor) -> tuple[float, Tensor, Tensor]:
    """c, and d (K,), so that the weights are c times those before, plus d, which is 0 for as many as possible; and c before + d."""
    both = (before != 0) & (weights != 0)
    c = float((weights[both] / before[both]).median()) if bool(both.any()) else 0.0
    scaled = c * before
    d = weights - scaled
    d = torch.where(d.abs() > SAME * (weights.abs() + scaled.abs()), d, 0)
    return c, d, scaled + d
