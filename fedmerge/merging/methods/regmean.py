"""Linear layers merged so that the outputs on every site's own inputs change least; everything else by the mean."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes, columnwise
from fedmerge.merging.curvature.gram import merge_layers
from fedmerge.merging.methods._base import Static


class Regmean(Static):
    """For every linear layer W^T = (sum_k G_k)^-1 sum_k G_k W_k^T, G_k = X_k^T X_k / rows; other parameters by the mean.

    Where sources differ: the paper sums X^T X, FusionBench averages it over images and tokens, so that experts weigh equally, as
    here. `ratio` shrinks the off-diagonal of G: the paper takes 0.9, FusionBench 0.95 as here, Ambekar et al. 1.0, with which a
    head whose inputs hardly vary blows up; a ridge keeps the sum invertible where inputs span too little.
    A site uploads one (d, d) matrix for each linear layer, which for a ViT-B is more than its weights.
    Worked example: d = 1, G = (1, 3), W = (0, 4): W = 12 / 4 = 3.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> a, b = ({"weight": torch.tensor([[weight]])} for weight in (0.0, 4.0))
    >>> G = [{"weight": torch.tensor([[gram]])} for gram in (1.0, 3.0)]
    >>> fedmerge.merge(model, [a, b], "regmean", statistics={"gram": G})["weight"]
    tensor([[3.0000]])
    """

    paper: ClassVar[str] = "Jin et al., Dataless knowledge fusion by merging weights (RegMean), ICLR 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    statistic: ClassVar[str] = "gram"

    ratio: float = Field(0.95, gt=0, le=1, description="factor of the elements of G off the diagonal")
    ridge: float = Field(1e-6, gt=0, le=1, description="share of the mean eigenvalue of sum_k G_k added to its diagonal")

    def rule(self, bank: Bank) -> Tensor:
        """(P,). Raises CheckpointError if the sites uploaded no Gram matrices."""
        G = bank.statistics.layers(self.statistic, self.kind())
        mean = columnwise(bank, lambda columns: bank.columns(columns).mean(0))
        return merge_layers(mean, bank, G, self.ratio, self.ridge)

    def working_bytes(self, sizes: Sizes) -> int:
        """The sites' Gram matrices, and one layer of all experts in float64 twice."""
        return sizes.experts * (4 * sizes.gram + 16 * sizes.largest)
