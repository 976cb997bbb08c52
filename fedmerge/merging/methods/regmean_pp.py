"""RegMean in rounds: every layer's inputs come through the layers that are already merged."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes, columnwise
from fedmerge.merging.curvature.gram import merge_layers
from fedmerge.merging.methods._base import Static


class RegmeanPp(Static):
    """As RegMean, with G_k of block l from site k's images sent through the merged blocks 1..l-1 and then through its own block l.

    The sites compute G block by block, one round of messages for each, between which the coordinator merges a block. Embeddings
    and norms are means. Where sources differ: FusionBench leaves the last norm at theta_0's; here it is a mean as all others.
    Worked example: with one block it is RegMean.
    """

    paper: ClassVar[str] = "Nguyen et al., RegMean++, 2025"
    needs: ClassVar[frozenset[str]] = frozenset({"gram_rounds"})

    mode: Literal["site", "target"] = Field("site", description="whose images pass through the layers")
    ratio: float = Field(1.0, gt=0, le=1, description="factor of the elements of G off the diagonal; as in the uploads")
    ridge: float = Field(1e-6, gt=0, le=1, description="share of the mean eigenvalue added to the diagonal; as in the uploads")

    @field_validator("mode")
    @classmethod
    def _not_at_the_target(cls, mode: str) -> str:
        if mode == "target":
            raise ValueError(
                "at the target all G_k come from the same images, and with equal G the merge is the mean; "
                "use 'mean', or mode 'site'"
            )
        return mode

    def rule(self, bank: Bank) -> Tensor:
        """(P,). Raises CheckpointError if the sites took no part in the rounds."""
        G = bank.statistics.layers("gram_rounds", self.kind())
        mean = columnwise(bank, lambda columns: bank.columns(columns).mean(0))
        return merge_layers(mean, bank, G, self.ratio, self.ridge)

    def working_bytes(self, sizes: Sizes) -> int:
        """The sites' Gram matrices, and one layer of all experts in float64 twice."""
        return sizes.experts * (4 * sizes.gram + 16 * sizes.largest)
