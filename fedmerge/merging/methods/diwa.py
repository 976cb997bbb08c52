"""The mean of all runs of all sites: every site sends the mean of its runs, whatever expert it selects."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes
from fedmerge.merging.methods._base import Static


class Diwa(Static):
    """theta = (1/K) sum_k (1/M) sum_m theta_km, over the M diverse runs of each of K sites.

    Sites send the soup of their runs beside their selected expert. Where the paper is silent: it trains all runs on pooled
    domains; among sites that pool nothing, the mean over all their runs is the nearest thing, and it is what is called DiWA here.
    Worked example: runs (1, 3) at one site and (5, 7) at the other give ((1 + 3)/2 + (5 + 7)/2) / 2 = 4.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> a, b = ({"weight": torch.tensor([row])} for row in ([1.0, 3.0], [5.0, 7.0]))
    >>> soups = [{"weight": torch.tensor([row])} for row in ([2.0, 3.0], [6.0, 5.0])]
    >>> fedmerge.merge(model, [a, b], "diwa", statistics={"soup": soups})["weight"]
    tensor([[4., 4.]])
    """

    paper: ClassVar[str] = "Rame et al., Diverse weight averaging (DiWA), NeurIPS 2022"
    needs: ClassVar[frozenset[str]] = frozenset({"soup"})

    def rule(self, bank: Bank) -> Tensor:
        """(P,). Raises CheckpointError if the sites sent no soups."""
        return bank.statistics.flat("soup", self.kind()).mean(0)

    @property
    def whole(self) -> bool:
        """The soups of all sites."""
        return True

    def working_bytes(self, sizes: Sizes) -> int:
        """The soups of all sites."""
        return 4 * sizes.experts * sizes.parameters
