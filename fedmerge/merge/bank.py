"""K experts as one flat matrix: encoder columns first, head columns last, and any of them, or a mixture, as a running model.

A linear merge is one matrix-vector product for each part, written in place. No copy of the weights is made per batch.
Below the experts' rows lie the anchors': theta_0, and a generalist if one is given. Coefficients are (K,) over the experts, or
(K + A,) over experts and anchors, so that rules which extrapolate from theta_0 use the same kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmerge.errors import CheckpointError
from fedmerge.merge.blocks import taus
from fedmerge.merge.buffers import Buffers
from fedmerge.merge.parts import Parts, StateDict
from fedmerge.merge.shelf import Mapped, Shelf
from fedmerge.merge.statistics import Statistics

BLOCK = 2**19
"""Columns that a merge on a CPU sums at a time."""


class Bank:
    """Experts theta (K, P), the model they run in, and what their owners declared.

    rows: (K + A, P), experts and then anchors. names: the experts'. anchors: subset of "theta_0", "generalist", in order.
    counts: training images of each expert, or None. temperatures: (K,), 1 where none was fitted. flips: whether a horizontal
    flip preserves the label. shared_head: whether all experts started from one head. encoder, head: slices of the P columns.
    statistics: what sites uploaded beside weights, by kind. mapped: the file that holds the rows, or None.
    """

    def __init__(
        self, model: nn.Module, parts: Parts, rows: Tensor, buffers: Buffers, names: Sequence[str], anchors: Sequence[str] = ()
    ) -> None:
        self.model, self.parts, self.rows, self.buffers = model, parts, rows, buffers
        self.names, self.anchors = tuple(names), tuple(anchors)
        self.K, self.P = len(self.names), rows.shape[1]
        self.theta = rows[: self.K]
        self.base = rows[self.anchor("theta_0")] if "theta_0" in self.anchors else None
        self.shapes = {name: model.get_parameter(name).shape for name in (*parts.encoder, *parts.head)}
        ends = list(accumulate(shape.numel() for shape in self.shapes.values()))
        self.slices = {name: slice(a, b) for name, a, b in zip(self.shapes, [0, *ends], ends, strict=False)}
        width = sum(self.shapes[name].numel() for name in parts.encoder)
        self.encoder, self.head = slice(0, width), slice(width, self.P)
        self.counts: tuple[int, ...] | None = None
        self.temperatures = torch.ones(self.K, dtype=rows.dtype, device=rows.device)
        self.flips, self.shared_head = False, True
        self.mapped: Mapped | None = None
        self.statistics = Statistics(self.names, self.slices)
        self._rows = [self._views(row) | buffers.of_row(k) for k, row in enumerate(rows)]
        self._merged = torch.empty_like(rows[0])

    @staticmethod
    def of(  # noqa: PLR0913 - all but the experts have defaults
        model: nn.Module,
        experts: Sequence[StateDict] | Mapping[str, StateDict],
        base: StateDict | None = None,
        *,
        generalist: StateDict | None = None,
        statistics: Mapping[str, Sequence[StateDict]] | None = None,
        counts: Sequence[int] | None = None,
        temperatures: Sequence[float] | None = None,
        flips: bool = False,
        head: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        variance: str = "linear",
    ) -> Bank:
        """A bank of state dicts that fit `model`, in the experts' order where there is one of each.

        base: theta_0. generalist: a model that an adaptive method may fall back on. statistics: by kind, one mapping of tensors
        per expert: "fisher" and "soup" by parameter, "gram" by weight. variance: the buffer policy, "linear" or "moment".
        Raises CheckpointError if there is no expert, or one does not fit the model or holds a NaN.
        """
        named = dict(experts) if isinstance(experts, Mapping) else {f"expert-{k}": x for k, x in enumerate(experts)}
        if not named:
            raise CheckpointError("found no expert; expected at least one")
        anchors = {name: state for name, state in (("theta_0", base), ("generalist", generalist)) if state is not None}
        shelf = Shelf(model, len(named) + len(anchors), head=None if head is None else tuple(head), device=device, dtype=dtype)
        for name, state in [*named.items(), *anchors.items()]:
            shelf.add(name, state)
        bank = Bank.on(shelf, tuple(named), tuple(anchors), variance)
        for kind, given in (statistics or {}).items():
            bank.statistics.add(kind, given, bank.rows)
        bank.flips = flips
        if counts is not None:
            bank.counts = tuple(counts)
        if temperatures is not None:
            bank.temperatures = torch.as_tensor(temperatures, dtype=dtype, device=bank.rows.device)
        return bank

    @staticmethod
    def on(shelf: Shelf, names: Sequence[str], anchors: Sequence[str] = (), variance: str = "linear") -> Bank:
        """A bank of the states that a shelf has been filled with: the experts `names`, then the anchors."""
        rows, buffers = shelf.rows, shelf.buffers(len(names), variance)
        skeleton = copy.deepcopy(shelf.model).to(device=rows.device, dtype=rows.dtype).eval().requires_grad_(False)
        bank = Bank(skeleton, shelf.parts, rows, buffers, names, anchors)
        bank.mapped = shelf.mapped
        return bank

    def anchor(self, name: str) -> int:
        """The row of an anchor. Raises CheckpointError if the bank was made without it."""
        if name not in self.anchors:
            given = {"theta_0": "base=theta_0", "generalist": "generalist=..."}[name]
            raise CheckpointError(f"{name}: the bank was made without it; expected Bank.of(..., {given})")
        return self.K + self.anchors.index(name)

    @property
    def tau(self) -> Tensor:
        """Task vectors tau_k = theta_k - theta_0 (K, P), at least float32. Raises CheckpointError without theta_0."""
        return taus(self)

    @property
    def merge_bytes(self) -> int:
        """Memory traffic of one linear merge: read K rows, write one."""
        return (self.K + 1) * self.P * self.theta.element_size()

    def mix(self, encoder: Tensor, head: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """theta (P,) = (sum_k encoder_k phi_k, sum_k head_k w_k), written into `out` or the bank's own buffer.

        encoder, head: (K,), or (K + A,) with the anchors; head defaults to encoder. A one-hot row returns that expert bit for bit,
        and an expert with coefficient 0 is not read, so that a broken one cannot spoil the others.
        """
        out = self._merged if out is None else out
        for part, weights in ((self.encoder, encoder), (self.head, encoder if head is None else head)):
            weighted_sum(self.rows[: len(weights), part], weights, out[part], self.read)
        return out

    def forward(self, theta: Tensor, batch: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """Logits (N, C) of the model with parameters theta (P,) on a batch (N, channels, H, W).

        coefficients: (K,) or (K + A,) convex weights for the BatchNorm statistics; default 1/K each expert.
        """
        return self._run(self._views(theta) | self.buffers.merged(coefficients), batch)

    def expert_logits(self, batch: Tensor) -> Tensor:
        """Logits (K, N, C) of every expert on a batch (N, channels, H, W)."""
        return torch.stack([self.row_logits(k, batch) for k in range(self.K)])

    def row_logits(self, row: int, batch: Tensor) -> Tensor:
        """Logits (N, C) of one expert, or of one anchor, as `anchor(name)` numbers it."""
        logits = self._run(self._rows[row], batch)
        self.read(self.P * self.rows.element_size())
        return logits

    def read(self, count: int) -> None:
        """Note that so many bytes of rows have been read, so that a bank on disk can let go of them."""
        if self.mapped:
            self.mapped.read(count)

    def forward_of(self, row: int) -> Callable[[Tensor, Tensor], Tensor]:
        """(theta (P,), batch) -> logits, with the BatchNorm statistics of one row."""
        buffers = self.buffers.of_row(row)
        return lambda theta, batch: self._run(self._views(theta) | buffers, batch)

    def state_dict(self, theta: Tensor, coefficients: Tensor | None = None) -> dict[str, Tensor]:
        """theta (P,) as a state dict that `model.load_state_dict` accepts, buffers included; a copy."""
        state = self._views(theta) | self.buffers.merged(coefficients)
        return {name: state[self.parts.aliases.get(name, name)].clone() for name in self.model.state_dict()}

    def _views(self, theta: Tensor) -> dict[str, Tensor]:
        pieces = torch.split(theta, [shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def _run(self, state: dict[str, Tensor], batch: Tensor) -> Tensor:
        logits: Any = functional_call(self.model, state, (batch.to(self.theta.dtype),))
        return logits  # type: ignore[no-any-return]


def weighted_sum(rows: Tensor, weights: Tensor, out: Tensor, read: Callable[[int], None] = lambda _: None) -> Tensor:
    """out (P,) = sum_k weights_k rows_k, reading only rows of weight other than 0. rows: (K, P).

    Block by block: what is being summed stays in the cache, so that memory is read once for each row and written once.
    read: told the bytes of rows that have been read, block by block.
    """
    used = [(k, weight) for k, weight in enumerate(weights.tolist()) if weight != 0]
    if not used:
        return out.zero_()
    if len(used) == 1 and used[0][1] == 1:
        return out.copy_(rows[used[0][0]])
    step = BLOCK if out.device.type == "cpu" else len(out)
    for start in range(0, len(out), step):
        block = out[start : start + step]
        for number, (k, weight) in enumerate(used):
            part = rows[k, start : start + step]
            if number == 0:
                torch.mul(part, weight, out=block)
            else:
                block.add_(part, alpha=weight)
        read(len(used) * len(block) * block.element_size())
    return out
