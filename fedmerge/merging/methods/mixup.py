"""A random point between the experts."""

from __future__ import annotations

import random
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.methods._base import Method, Static


class Mixup(Static):
    """theta = sum_k lambda_k theta_k, lambda ~ Dirichlet(a, ..., a): one draw for the whole model.

    For two experts this is the paper's lambda ~ Beta(a, a). `draws` gives that many rows, of seeds `seed`, `seed` + 1, ..., because
    one draw says little. Where sources differ: the released driver passes a flag for `a`, which makes it uniform; here a = 0.5.
    Worked example: lambda = (0.25, 0.75), experts 4 and 8 give 7.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> a, b = ({"weight": torch.tensor([row])} for row in ([4.0, 0.0], [8.0, 1.0]))
    >>> fedmerge.merge(model, [a, b], "mixup", seed=1)["weight"]
    tensor([[5.1165, 0.2791]])
    """

    paper: ClassVar[str] = "Zhou et al., Mixup model merge (M3), 2025"

    a: float = Field(0.5, gt=0, le=1e6, description="concentration of the Dirichlet distribution")
    seed: int = Field(0, ge=0, description="seed of the first draw")
    draws: int = Field(1, ge=1, le=100, description="number of draws, each with a row in the table")

    def expand(self, names: tuple[str, ...]) -> tuple[Method, ...]:
        """One row for each draw."""
        if self.draws == 1:
            return (self,)
        seeds = range(self.seed, self.seed + self.draws)
        return tuple(self.model_copy(update={"seed": seed, "draws": 1, "label": f"{self.key}:{seed}"}) for seed in seeds)

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        return bank.mix(self.statistics(bank), out=bank.blank())

    def statistics(self, bank: Bank) -> Tensor:
        """lambda (K,) on the simplex: independent gamma draws, by the seed and the experts' names, normalized."""
        draws = [random.Random(f"mixup {self.seed} {name}").gammavariate(self.a, 1) for name in bank.names]
        gamma = torch.tensor(draws, dtype=torch.float64)
        return gamma / gamma.sum()
