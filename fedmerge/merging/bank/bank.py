"""K experts as one flat matrix: encoder columns first, head columns last, and any of them, or a mixture, as a running model.

A linear merge is one matrix-vector product for each part, written in place. No copy of the weights is made per batch.
Below the experts' rows lie the anchors': theta_0, and a generalist if one is given. Coefficients are (K,) over the experts, or
(K + A,) over experts and anchors, so that rules which extrapolate from theta_0 use the same kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from fedmerge.errors import CheckpointError
from fedmerge.merging.bank.buffers import Buffers
from fedmerge.merging.bank.layout import Parts, StateDict, found_as
from fedmerge.merging.bank.patches import WindowProducts
from fedmerge.merging.bank.recorded import Recorded
from fedmerge.merging.bank.row_storage import Add, Mapped, Shelf, weighted_sum
from fedmerge.merging.bank.stateless import Stateless
from fedmerge.merging.bank.statistics import Statistics

ALL = slice(None)

AT_ONCE = 32
"""Experts that a GPU is asked to run in one recording."""

Rule = Callable[[str, Tensor], Tensor]
"""What is done with one expert's name and task vector (P,). It travels to where the expert is, so it must be picklable."""


class Shards(Protocol):
    """Where the experts are that a bank does not hold itself.

    Attributes
    ----------
    experts : tuple[int, ...]
        How many each shard has, at least one, in the order of the bank's names.
    """

    experts: tuple[int, ...]

    def ask(self, what: str, arguments: Sequence[Sequence[Any] | None]) -> list[Tensor]:
        """One of `sharded.WORK` by every shard at the same time, with arguments of its own; a shard with None is not asked."""
        ...


class Bank:
    """Experts theta (K, P), the model they run in, and what their owners declared.

    Further attributes:
    counts: training images of each expert, or None. temperatures: (K,), 1 where none was fitted. flips: whether a horizontal
    flip preserves the label. shared_head: whether all experts started from one head. encoder, head: slices of the P columns.
    kept: models (P,) that methods merge once for these experts, and numbers that they measure once, by name.
    statistics: what sites uploaded beside weights, by kind. mapped: the file that holds the rows, or None. shards: who
    has the experts in place of this bank, or None. like: an empty tensor of the rows' kind and place.

    Parameters
    ----------
    model : nn.Module
        The architecture; it is run, and its own parameters are not read.
    parts : Parts
        Names of its tensors.
    rows : Tensor
        (K + A, P), experts and then anchors; in `sharded.py` the anchors' alone are here, and `rows` is refused.
    buffers : Buffers
        BatchNorm statistics and everything else in the state.
    names : Sequence[str]
        The experts', K of them.
    anchors : Sequence[str], default ()
        Subset of "theta_0" and "generalist", in order, A of them.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [4.0, -1.0], [2.0, 3.0]))
    >>> bank = Bank.of(model, {"axial": a, "coronal": b}, start)
    >>> bank.K, bank.P, bank.names
    (2, 2, ('axial', 'coronal'))
    >>> bank.tau  # theta_k - theta_0
    tensor([[ 4., -1.],
            [ 2.,  3.]])
    >>> theta = bank.mix(torch.tensor([0.5, 0.5]))
    >>> bank.state_dict(theta)["weight"]
    tensor([[3., 1.]])
    """

    def __init__(
        self, model: nn.Module, parts: Parts, rows: Tensor, buffers: Buffers, names: Sequence[str], anchors: Sequence[str] = ()
    ) -> None:
        self.model, self.parts, self.buffers = model, parts, buffers
        self.call, self.recorded = Stateless(model), Recorded()
        self.names, self.anchors = tuple(names), tuple(anchors)
        self.K, self.A, self.P = len(self.names), len(self.anchors), rows.shape[1]
        self.like, self._held = rows.new_empty(0), rows
        self._first = self.K + self.A - len(rows)  # number of the first row that is held here
        self.shapes = {name: model.get_parameter(name).shape for name in (*parts.encoder, *parts.head)}
        ends = list(accumulate(shape.numel() for shape in self.shapes.values()))
        self.slices = {name: slice(a, b) for name, a, b in zip(self.shapes, [0, *ends], ends, strict=False)}
        width = sum(self.shapes[name].numel() for name in parts.encoder)
        self.encoder, self.head = slice(0, width), slice(width, self.P)
        self.counts: tuple[int, ...] | None = None
        self.temperatures = torch.ones(self.K, dtype=self.wide, device=rows.device)
        self.flips, self.shared_head = False, True
        self.mapped: Mapped | None = None
        self.shards: Shards | None = None
        self.kept: dict[str, Tensor] = {}
        self.statistics = Statistics(self.names, self.slices)
        self._rows: dict[int, dict[str, Tensor]] = {}
        self._merged = self.blank()

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
        """A bank of state dicts that fit `model`.

        Parameters
        ----------
        model : nn.Module
            The architecture; it is copied, and never changed.
        experts : sequence or mapping of state dicts
            K experts, in this order; without names they are expert-0, expert-1, ...
        base : state dict, optional
            theta_0, the initialization that all experts started from: the anchor "theta_0".
        generalist : state dict, optional
            A model that an adaptive method may fall back on: the anchor "generalist".
        statistics : mapping, optional
            By kind, one mapping of tensors for each expert: "fisher" and "soup" by parameter, "gram" and "gram_rounds" by weight,
            "centroid" by its own name.
        counts : sequence of int, optional
            Training images of each expert.
        temperatures : sequence of float, optional
            Temperature of each expert; default 1.
        flips : bool
            Whether a horizontal flip preserves the label.
        head : sequence of str, optional
            Names of the classifier's parameters; default: timm's `get_classifier()`, else the last linear layer.
        device, dtype
            Of the rows, and so of all that is merged and run.
        variance : {"linear", "moment"}
            How variances of BatchNorm are mixed; see `Buffers`.

        Returns
        -------
        Bank
            With a copy of all parameters.

        Raises
        ------
        CheckpointError
            If there is no expert, or one does not fit the model or holds a NaN.
        """
        named = dict(experts) if isinstance(experts, Mapping) else {f"expert-{k}": x for k, x in enumerate(experts)}
        if not named:
            raise CheckpointError("found no expert; expected at least one")
        anchors = {name: state for name, state in (("theta_0", base), ("generalist", generalist)) if state is not None}
        shelf = Shelf(
            model,
            len(named) + len(anchors),
            head=head if head is None or isinstance(head, str) else tuple(head),
            device=device,
            dtype=dtype,
        )
        for name, state in [*named.items(), *anchors.items()]:
            shelf.add(name, state)
        bank = Bank.on(shelf, tuple(named), tuple(anchors), variance)
        for kind, given in (statistics or {}).items():
            bank.statistics.add(kind, given, bank.rows)
        bank.flips = flips
        if counts is not None:
            bank.counts = tuple(counts)
        if temperatures is not None:
            bank.temperatures = torch.as_tensor(temperatures, dtype=bank.wide, device=bank.rows.device)
        return bank

    @classmethod
    def on(cls, shelf: Shelf, names: Sequence[str], anchors: Sequence[str] = (), variance: str = "linear") -> Self:
        """A bank of the states that a shelf has been filled with: the experts `names`, then the anchors."""
        rows, buffers = shelf.rows, shelf.buffers(len(names), variance)
        skeleton = copy.deepcopy(shelf.model).to(device=rows.device, dtype=rows.dtype).eval().requires_grad_(False)
        bank = cls(skeleton, shelf.parts, rows, buffers, names, anchors)
        bank.mapped = shelf.mapped
        return bank

    @cached_property
    def joined(self) -> Bank:
        """The same rows, with theta_0 as one more expert: the last. Raises CheckpointError without theta_0, and over shards."""
        if self.shards is not None:
            raise CheckpointError("with_theta_0: found experts that are spread over shards; expected all of them in one process")
        self.anchor("theta_0")
        twin = copy.copy(self)
        twin.names, twin.anchors = (*self.names, "theta_0"), self.anchors[1:]
        twin.K, twin.A, twin.counts = self.K + 1, self.A - 1, None
        twin.temperatures = torch.cat([self.temperatures, self.temperatures.new_ones(1)])
        twin.buffers = replace(self.buffers, experts=twin.K)
        twin.kept, twin.statistics, twin._merged = {}, Statistics(twin.names, self.slices), self.blank()
        twin.recorded = Recorded()
        return twin

    def heads(self, scale: Tensor) -> Bank:
        """The heads alone, each expert's divided by `scale` (K,): a bank of their parameters, for rules that merge them apart."""
        experts = self.columns(self.head) / scale.to(self.like)[:, None]
        anchors = [self.anchor_row(name)[None, self.head] for name in self.anchors]
        of_heads = replace(self.parts, encoder=())
        apart = Bank(self.model, of_heads, torch.cat([experts, *anchors]), self.buffers, self.names, self.anchors)
        apart.shared_head = self.shared_head
        return apart

    def anchor(self, name: str) -> int:
        """The row of an anchor. Raises CheckpointError if the bank was made without it."""
        if name not in self.anchors:
            given = {"theta_0": "base=theta_0", "generalist": "generalist=..."}[name]
            raise CheckpointError(f"{name}: found a bank that was made without it; expected Bank.of(..., {given})")
        return self.K + self.anchors.index(name)

    def anchor_row(self, name: str) -> Tensor:
        """The parameters (P,) of an anchor. Raises CheckpointError if the bank was made without it."""
        return self._held[self.anchor(name) - self._first]

    @property
    def rows(self) -> Tensor:
        """Experts and then anchors (K + A, P)."""
        return self._held

    @property
    def theta(self) -> Tensor:
        """The experts (K, P)."""
        return self.rows[: self.K]

    @property
    def base(self) -> Tensor | None:
        """theta_0 (P,), if the bank has it."""
        return self.anchor_row("theta_0") if "theta_0" in self.anchors else None

    @property
    def resident(self) -> int | None:
        """Bytes of the experts' rows that may be here at a time; None if all are."""
        return self.mapped.resident if self.mapped else None

    def columns(self, at: slice) -> Tensor:
        """Some columns of all experts (K, width)."""
        return self.theta[:, at]

    def blank(self, dtype: torch.dtype | None = None) -> Tensor:
        """Room for one model (P,), by default in the dtype of the rows."""
        return self.like.new_empty(self.P, dtype=dtype)

    @property
    def tau(self) -> Tensor:
        """Task vectors tau_k = theta_k - theta_0 (K, P), at least float32. Raises CheckpointError without theta_0."""
        return self.taus()

    def taus(self, columns: slice = ALL) -> Tensor:
        """Task vectors tau_k = theta_k - theta_0 (K, width), at least float32. Raises CheckpointError without theta_0."""
        theta_0 = self.anchor_row("theta_0")[columns].to(self.wide)
        return self.columns(columns).to(self.wide) - theta_0

    def thetas(self, columns: slice = ALL) -> Tensor:
        """The experts' parameters (K, width), at least float32; no copy where the rows are that."""
        return self.columns(columns).to(self.wide)

    def task_vector(self, k: int, out: Tensor | None = None) -> Tensor:
        """One expert's task vector tau_k (P,), at least float32, in `out` if given. Raises CheckpointError without theta_0."""
        return torch.sub(self.theta[k].to(self.wide), self.anchor_row("theta_0").to(self.wide), out=out)

    @property
    def wide(self) -> torch.dtype:
        """The dtype in which task vectors are computed: float32, or float64 where the rows are."""
        return torch.float64 if self.like.dtype == torch.float64 else torch.float32

    def each(self, rule: Rule) -> Tensor:
        """rule(name_k, tau_k) of every expert, stacked: (K,) for a rule that gives one number."""
        found, room = [], self.blank(self.wide)
        for k, name in enumerate(self.names):
            found.append(rule(name, self.task_vector(k, room)).clone())  # a rule may write over what it is given
            self.read(self.P * self.like.element_size())
        return torch.stack(found)

    @property
    def merge_bytes(self) -> int:
        """Memory traffic of one linear merge: read K rows, write one."""
        return (self.K + 1) * self.P * self.like.element_size()

    def mix(self, encoder: Tensor, head: Tensor | None = None, out: Tensor | None = None, add: Add = weighted_sum) -> Tensor:
        """theta (P,) = (sum_k encoder_k phi_k, sum_k head_k w_k), written into `out` or the bank's own buffer.

        A one-hot row returns that expert bit for bit, and an expert with coefficient 0 is not read, so that a broken one cannot
        spoil the others. It carries the encoder's coefficients: `forward` and `state_dict` mix BatchNorm statistics by them.

        Parameters
        ----------
        encoder : Tensor
            Coefficients (K,), or (K + A,) with the anchors.
        head : Tensor, optional
            The same for the head; default: those of the encoder.
        out : Tensor, optional
            Room for the result (P,); default: the bank's own, which the next merge writes over.
        add : RunningSum, optional
            What sums the encoders, and knows of earlier sums; default: nobody does.

        Returns
        -------
        Tensor
            theta (P,), which is `out`.
        """
        out = self._merged if out is None else out
        add(self.rows[: len(encoder), self.encoder], encoder, out[self.encoder], self.read)
        head = encoder if head is None else head
        weighted_sum(self.rows[: len(head), self.head], head, out[self.head], self.read)
        return merged_by(out, encoder)

    def forward(self, theta: Tensor, batch: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """Logits of the model with given parameters, in evaluation mode.

        Parameters
        ----------
        theta : Tensor
            Parameters (P,), encoder first.
        batch : Tensor
            Normalized images (N, channels, H, W).
        coefficients : Tensor, optional
            Convex weights (K,) or (K + A,) for the BatchNorm statistics; default: those that theta was merged by, as `mix` and
            `Static.merge` give it; for a row of the bank, its own; for any other tensor, also a copy, 1/K for each expert.

        Returns
        -------
        Tensor
            Logits (N, C).
        """
        buffers = self.buffers.merged(self._behind(theta, coefficients))

        def run(batch: Tensor, *values: Tensor) -> Tensor:
            return self._run(self._views(theta) | dict(zip(buffers, values, strict=True)), batch)

        return self.recorded(("theta", theta.data_ptr()), run, batch, *buffers.values())

    def expert_logits(self, batch: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Logits (K, N, C) of every expert on a batch (N, channels, H, W), or of those of these rows, in their order."""
        asked = tuple(range(self.K) if rows is None else rows)
        if not batch.is_cuda or len(asked) > AT_ONCE:
            return torch.stack([self.row_logits(k, batch) for k in asked])

        def run(batch: Tensor) -> Tensor:
            return torch.stack(self.recorded.side_by_side([partial(self._run, self._row(k), batch) for k in asked]))

        return self.recorded(("experts", asked), run, batch)

    def row_logits(self, row: int, batch: Tensor) -> Tensor:
        """Logits (N, C) of one expert, or of one anchor, as `anchor(name)` numbers it."""
        logits = self.recorded(("row", row), partial(self._run, self._row(row)), batch)
        self.read(self.P * self.like.element_size())
        return logits

    def _row(self, row: int) -> dict[str, Tensor]:
        if row not in self._rows:  # views of a thousand experts take a second and 200 MB, and most are not asked often
            self._rows[row] = self._views(self._held[row - self._first]) | self.buffers.of_row(row)
        return self._rows[row]

    def read(self, count: int) -> None:
        """Note that so many bytes of rows have been read, so that a bank on disk can let go of them."""
        if self.mapped:
            self.mapped.read(count)

    def forward_of(self, row: int) -> Callable[[Tensor, Tensor], Tensor]:
        """(theta (P,), batch) -> logits, with the BatchNorm statistics of one row."""
        buffers = self.buffers.of_row(row)
        return lambda theta, batch: self._run(self._views(theta) | buffers, batch)

    def state_dict(self, theta: Tensor, coefficients: Tensor | None = None) -> dict[str, Tensor]:
        """Parameters as a state dict that `model.load_state_dict` accepts, buffers included.

        Parameters
        ----------
        theta : Tensor
            Parameters (P,), encoder first.
        coefficients : Tensor, optional
            As in `forward`.

        Returns
        -------
        dict of str to Tensor
            A copy.
        """
        state = self._views(theta) | self.buffers.merged(self._behind(theta, coefficients))
        return {name: state[self.parts.aliases.get(name, name)].clone() for name in self.model.state_dict()}

    def _behind(self, theta: Tensor, given: Tensor | None) -> Tensor | None:
        """Weights of the BatchNorm statistics for parameters theta (P,); None is 1/K for each expert."""
        if given is not None or not self.buffers.pairs:
            return given
        held = self._held if self._held._base is None else self._held._base
        if theta._base is not None and theta._base is held:  # a row of the bank itself
            row = (theta.storage_offset() - self._held.storage_offset()) // self._held.stride(0) + self._first
            return torch.nn.functional.one_hot(torch.tensor(row), self.K + self.A).double()
        return getattr(theta, "merged_by", None)

    def _views(self, theta: Tensor) -> dict[str, Tensor]:
        pieces = torch.split(theta, [shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def _run(self, state: dict[str, Tensor], batch: Tensor) -> Tensor:
        with WindowProducts() if batch.is_cuda else nullcontext():
            logits = self.call(state, batch.to(self.like.dtype))
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
            raise CheckpointError(f"model: found {found_as(logits)} as its output; expected logits (N, C) of two classes or more")
        return logits


def merged_by(theta: Tensor, coefficients: Tensor | None) -> Tensor:
    """Let merged parameters carry the weights of their BatchNorm statistics.

    Parameters
    ----------
    theta : Tensor
        Merged parameters (P,); the same tensor comes back.
    coefficients : Tensor | None
        Weights (K,) or (K + A,) of the experts' BatchNorm statistics; None is 1/K each.

    Returns
    -------
    Tensor
        theta (P,), with the weights as its attribute.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import merged_by
    >>> theta = torch.zeros(3)
    >>> merged_by(theta, torch.tensor([0.9, 0.1])) is theta
    True
    """
    theta.merged_by = None if coefficients is None else coefficients.detach().clone()  # type: ignore[attr-defined]
    return theta
