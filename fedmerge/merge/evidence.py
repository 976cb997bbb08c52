"""What the experts say about one batch: computed once, when first asked for, and shared by all methods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmerge.merge.augment import VIEWS, View, resolve
from fedmerge.merge.bank import Bank
from fedmerge.merge.entropy import entropy, log_probabilities


@dataclass
class Bill:
    """The views of a batch that one method asked for; `forwards` is what it would have cost alone."""

    experts: int
    views: set[str] = field(default_factory=set)

    @property
    def forwards(self) -> int:
        """Forwards of the batch through one model."""
        return self.experts * len(self.views)


class Evidence:
    """The experts' logits on a batch (N, channels, H, W) and on its augmented views.

    An expert whose logits are not all finite is not valid: its entropy counts as infinite, so that it gets no weight.
    """

    def __init__(self, bank: Bank, batch: Tensor) -> None:
        self.bank, self.batch = bank, batch
        self._logits: dict[str, Tensor] = {}
        self._bill = Bill(bank.K)

    @staticmethod
    def of(bank: Bank, batch: Tensor) -> Evidence:
        """Evidence about a normalised batch (N, channels, H, W)."""
        return Evidence(bank, batch)

    @contextmanager
    def billed(self) -> Iterator[Bill]:
        """Note what is asked for inside the block, whether or not it had been computed before."""
        outer, self._bill = self._bill, Bill(self.bank.K)
        try:
            yield self._bill
        finally:
            self._bill = outer

    @property
    def forwards_run(self) -> int:
        """Forwards through one model that were really run, whoever asked."""
        return self.bank.K * len(self._logits)

    @property
    def logits(self) -> Tensor:
        """Logits (K, N, C) of the batch as it is."""
        return self.view_logits("none")

    @property
    def valid(self) -> Tensor:
        """(K,) bool: all logits of the expert are finite."""
        return torch.isfinite(self.logits).flatten(1).all(1)

    @property
    def classes(self) -> int:
        """C."""
        return self.logits.shape[-1]

    def view_logits(self, view: View) -> Tensor:
        """Logits (K, N, C) of an augmented view of the batch."""
        name = resolve(view, self.bank.flips)
        self._bill.views.add(name)
        if name not in self._logits:
            self._logits[name] = self.bank.expert_logits(VIEWS[name](self.batch))
        return self._logits[name]

    def log_p(self, view: View = "none", calibrated: bool = False) -> Tensor:
        """log p_k (K, N, C); `calibrated` divides logits by each site's temperature T_k first."""
        temperatures = self.bank.temperatures[:, None, None] if calibrated else 1.0
        return log_probabilities(self.view_logits(view), temperatures)

    def entropies(self, calibrated: bool = False) -> Tensor:
        """H_k(x_i) (K, N) in [0, ln C] nats; infinite for an expert that is not valid."""
        h = entropy(self.log_p(calibrated=calibrated))
        return torch.where(self.valid[:, None], h, torch.inf)

    def batch_entropies(self, calibrated: bool = False) -> Tensor:
        """Hbar_k (K,) = (1/N) sum_i H_k(x_i): the mean of entropies, never the entropy of the mean prediction."""
        return self.entropies(calibrated).mean(1)
