"""Task vectors thinned at random, small entries more than large ones, and merged by sign."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes, block
from fedmerge.merging.bank.ranks import order_of
from fedmerge.merging.methods._base import Static
from fedmerge.merging.methods.dare import Draws, cut_at, rescaling
from fedmerge.merging.methods.ties import by_sign


class Della(Static):
    """tau'_k = m_k tau_k / (1 - p_k), m_k ~ Bernoulli(1 - p_k); theta = theta_0 + s tau*, tau* by the sign election of TIES.

    p_k = p + e/2 - e (rank - 1) / (n - 1), the rank of |tau_k| among the n entries of its row: from p + e/2 for the smallest to
    p - e/2 for the largest; p where n = 1. A row is what one output reads; a tensor with one axis is one row.
    p_k is rounded to a multiple of 2^-16, in the mask and in the division alike.
    With e = 0 it is DARE before a TIES that trims nothing, with the same draws.
    Where sources differ: the paper's steps are e / n, its code's and mergekit's (whose epsilon is e/2) are e / (n - 1), as here, so
    that both ends are reached. mergekit may restore the norm of tau_k instead of dividing by 1 - p_k.
    Worked example: p = 0.5, e = 0.2, tau = (1, 3, 2): p_k = (0.6, 0.4, 0.5).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [4.0, -1.0], [2.0, 3.0]))
    >>> fedmerge.merge(model, [a, b], "della", base=start, drop=0.5, window=0.5, scale=1, seed=9)["weight"]
    tensor([[6.6667, 4.0000]])
    """

    paper: ClassVar[str] = "Deep et al., DELLA-merging, 2024 (arXiv 2406.11617)"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    drop: float = Field(0.5, ge=0, lt=1, description="p, the mean probability that an entry is dropped")
    window: float = Field(
        0.2, ge=0, lt=1, description="e, the difference between these probabilities for the smallest and the largest entry"
    )
    rank_in: Literal["row", "tensor"] = Field("row", description="entries among which magnitudes are ranked")
    combine: Literal["mean", "sum"] = Field("mean", description="how entries of the elected sign are merged")
    scale: float = Field(0.3, ge=0, le=2, description="s, the scale of the merged task vector")
    seed: int = Field(0, ge=0, description="seed of the masks")

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        if self.drop - self.window / 2 < 0 or self.drop + self.window / 2 >= 1:
            low, high = self.drop - self.window / 2, self.drop + self.window / 2
            raise ValueError(f"drop -/+ window / 2 is {low:g} to {high:g}: probabilities of dropping must be in [0, 1)")
        return self

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        return by_sign(bank, self._thinned_tensors(bank), self.combine, self.scale)

    def working_bytes(self, sizes: Sizes) -> int:
        """One tensor's task vectors of all experts, as they are and thinned, and what one of them is thinned by."""
        return 6 * 4 * sizes.experts * sizes.largest

    def _thinned_tensors(self, bank: Bank) -> Iterator[tuple[slice, Tensor]]:
        """m_k tau_k / (1 - p_k) of one tensor after another: (columns, (K, d))."""
        draws = [Draws(self.seed, name) for name in bank.names]
        for name, columns in bank.slices.items():
            shape, tau = bank.shapes[name], bank.taus(columns)
            rows = shape[0] if self.rank_in == "row" and len(shape) > 1 else 1
            for tau_k, draw in zip(tau.view(bank.K, rows, -1), draws, strict=True):
                for some in torch.split(tau_k, max(1, block(tau, 4) // max(1, tau_k.shape[1]))):
                    self._thin(some, draw)
            yield columns, tau
            bank.read(tau.numel() * bank.like.element_size())

    def _thin(self, tau: Tensor, draw: Draws) -> None:
        """m_k tau_k / (1 - p_k) of some rows of one expert's tensor (rows, n), in place."""
        cut = self._cuts(tau.abs())
        m = draw.take(tau.numel()).view(tau.shape).to(tau.device).ge_(cut)  # 1 and 0 as numbers
        tau.mul_(m.to(tau)).mul_(rescaling(cut).to(tau))

    def _cuts(self, magnitude: Tensor) -> Tensor:
        """From which draw on an entry stays (rows, n), int16, by its magnitude: p_k to the nearest 2^-16."""
        n = magnitude.shape[-1]
        share = torch.arange(n, dtype=torch.float64) / (n - 1) if n > 1 else torch.tensor([0.5], dtype=torch.float64)
        p = self.drop + self.window * (0.5 - share)  # from the smallest to the largest
        order, cut = order_of(magnitude), cut_at(p).to(magnitude.device)
        return torch.empty_like(order, dtype=torch.int16).scatter_(-1, order, cut.expand(order.shape))
