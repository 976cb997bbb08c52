"""A bank whose experts lie in shards: banks of some of them each, in other processes or on other machines.

The target has the anchors, the model and what is small (BatchNorm statistics, temperatures). A batch goes to every shard, which
answers with its experts' logits; coefficients go to every shard, which answers with its part of the sum; and rules that look at
every column get the columns of all experts block by block. So no expert's row is where the merged model runs. The results are
those of one bank, but for the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fedmerge.errors import CheckpointError
from fedmerge.merging.bank.bank import Bank, Rule, Shards, merged_by
from fedmerge.merging.bank.row_storage import Add, Shelf, weighted_sum

BLOCK_BYTES = 64 * 2**20
"""Bytes of the experts' columns, and of what a rule makes of them, that are at the target at a time."""

WORK: dict[str, Callable[..., Tensor]] = {
    "expert_logits": Bank.expert_logits,
    "row_logits": Bank.row_logits,
    "columns": Bank.columns,
    "mix": Bank.mix,
    "each": Bank.each,
}
"""What a shard does with its own bank when it is asked."""


@torch.no_grad()
def answer_here(bank: Bank, what: str, arguments: Sequence[Any]) -> Tensor:
    """The answer of one shard to a question about its experts.

    Parameters
    ----------
    bank : Bank
        The shard's experts.
    what : str
        The question, a name in `WORK`.
    arguments : Sequence[Any]
        Of the question.

    Returns
    -------
    Tensor
        The answer; its shape depends on the question.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.bank.sharded import answer_here
    >>> a, b = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.0, 4.0]))
    >>> bank = Bank.of(torch.nn.Linear(1, 2, bias=False), {"axial": a, "coronal": b})
    >>> answer_here(bank, "columns", [slice(0, 1)])
    tensor([[2.],
            [0.]])
    """
    return WORK[what](bank, *(one.to(bank.like.device) if isinstance(one, Tensor) else one for one in arguments))


class Here:
    """Shards in this process: what the remote ones do, without their processes.

    Parameters
    ----------
    banks : Sequence[Bank]
        One for each shard.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.bank.sharded import Here
    >>> a, b = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.0, 4.0]))
    >>> bank = Bank.of(torch.nn.Linear(1, 2, bias=False), {"axial": a, "coronal": b})
    >>> shards = Here([bank, bank])
    >>> shards.experts, len(shards.ask("columns", [[slice(0, 1)], [slice(0, 1)]]))
    ((2, 2), 2)
    """

    def __init__(self, banks: Sequence[Bank]) -> None:
        self.banks = tuple(banks)
        self.experts = tuple(bank.K for bank in banks)

    def ask(self, what: str, arguments: Sequence[Sequence[Any] | None]) -> list[Tensor]:
        """One after another."""
        return [answer_here(bank, what, given) for bank, given in zip(self.banks, arguments, strict=True) if given is not None]


class SpreadBank(Bank):
    """A bank of K experts that shards have; the anchors' rows are here.

    It is made by `over`. Rows of experts are refused with CheckpointError.

    Attributes
    ----------
    spans : list[slice]
        Columns of the experts' names that each shard has, in order.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.bank.row_storage import Shelf
    >>> from fedmerge.merging.bank.sharded import Here, SpreadBank
    >>> model, states = torch.nn.Linear(1, 2, bias=False), [{"weight": torch.full((2, 1), value)} for value in (1.0, 3.0)]
    >>> shelf = Shelf(model, rows=0)
    >>> _ = [shelf.add_beside(state) for state in states]
    >>> bank = SpreadBank.over(Here([Bank.of(model, [state]) for state in states]), shelf, ["axial", "coronal"], [])
    >>> bank.mix(torch.tensor([0.5, 0.5]))
    tensor([2., 2.])
    """

    spans: list[slice]
    """Which experts each shard has."""

    @staticmethod
    def over(shards: Shards, shelf: Shelf, names: Sequence[str], anchors: Sequence[str]) -> SpreadBank:
        """shelf: what the experts have beside their parameters, and then the anchors whole."""
        bank = SpreadBank.on(shelf, names, anchors)
        bank.shards = shards
        ends = list(accumulate(shards.experts))
        bank.spans = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        assert ends[-1] == bank.K
        return bank

    @property
    def rows(self) -> Tensor:
        """Refused: a method that wants them says so in `whole`, and the target does not begin with it."""
        raise CheckpointError(
            "target.shards: found experts that are spread over shards; expected all of them in one process for this method"
        )

    @property
    def tau(self) -> Tensor:
        """Refused as `rows` is."""
        return self.rows

    @property
    def resident(self) -> int:
        """Rules about columns, or tensors, get them in pieces."""
        return BLOCK_BYTES

    def columns(self, at: slice) -> Tensor:
        """Some columns of all experts (K, width)."""
        return torch.cat(self.asked("columns", at))

    def mix(self, encoder: Tensor, head: Tensor | None = None, out: Tensor | None = None, add: Add = weighted_sum) -> Tensor:
        """theta (P,): every shard sums its experts, those without a coefficient are not asked, and the anchors are added here.

        Earlier sums are not known to the shards.
        """
        head = encoder if head is None else head
        out = self._merged if out is None else out
        for part, weights in ((self.encoder, encoder), (self.head, head)):
            weighted_sum(self._held[: len(weights) - self.K, part], weights[self.K :], out[part])
        pairs = [(encoder[span].cpu(), head[span].cpu()) for span in self.spans]
        assert self.shards is not None
        for partial in self.shards.ask("mix", [pair if bool(torch.cat(pair).any()) else None for pair in pairs]):
            out += partial.to(out)
        return merged_by(out, encoder)

    def each(self, rule: Rule) -> Tensor:
        """rule(name_k, tau_k) of every expert, stacked, by its shard."""
        return torch.cat(self.asked("each", rule))

    def asked(self, what: str, *arguments: Any) -> list[Tensor]:
        """The answers of all shards, here."""
        assert self.shards is not None
        return [found.to(self.like.device) for found in self.shards.ask(what, [arguments] * len(self.shards.experts))]

    def expert_logits(self, batch: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Logits (K, N, C) of every expert, or of those of these rows, on a batch, all shards at the same time."""
        if rows is None:
            return torch.cat(self.asked("expert_logits", batch))
        own = [[row for row in rows if span.start <= row < span.stop] for span in self.spans]
        asked = [
            (batch, [row - span.start for row in there]) if there else None for there, span in zip(own, self.spans, strict=True)
        ]
        assert self.shards is not None
        found = torch.cat([part.to(self.like.device) for part in self.shards.ask("expert_logits", asked)])
        place = {row: number for number, row in enumerate(row for there in own for row in there)}
        return found[[place[row] for row in rows]]

    def row_logits(self, row: int, batch: Tensor) -> Tensor:
        """Logits (N, C) of one expert, by its shard, or of one anchor."""
        if row >= self.K:
            return super().row_logits(row, batch)
        assert self.shards is not None
        asked = [(row - span.start, batch) if span.start <= row < span.stop else None for span in self.spans]
        return self.shards.ask("row_logits", asked)[0].to(self.like.device)
