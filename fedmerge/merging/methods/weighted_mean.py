"""The mean of the experts' weights, weighted by how many images each was trained on."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.errors import CheckpointError
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.methods._base import Static


class WeightedMean(Static):
    """theta = sum_k (n_k / n) theta_k, n = sum_k n_k.

    Worked example: experts (1, 4) and (3, 0) with 30 and 10 images give (1.5, 3).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> a, b = ({"weight": torch.tensor([row])} for row in ([1.0, 4.0], [3.0, 0.0]))
    >>> fedmerge.merge(model, [a, b], "weighted_mean", counts=[30, 10])["weight"]
    tensor([[1.5000, 3.0000]])
    """

    paper: ClassVar[str] = "McMahan et al., FedAvg, AISTATS 2017, one communication round"
    needs: ClassVar[frozenset[str]] = frozenset({"counts"})

    def rule(self, bank: Bank) -> Tensor:
        """The weighted mean of the rows (P,). Raises CheckpointError if the bank has no counts."""
        return bank.mix(self.statistics(bank), out=bank.blank())

    def statistics(self, bank: Bank) -> Tensor:
        """n_k / n (K,), as for the parameters."""
        if bank.counts is None:
            raise CheckpointError("weighted_mean: found no image counts; expected one for each expert (Bank.of counts=...)")
        n = torch.tensor(bank.counts, dtype=torch.float64)
        return n / n.sum()
