"""RegMean in rounds: every layer's inputs come through the layers that are already merged."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from fedmerge.merging.methods.regmean import Regmean


class RegmeanPp(Regmean):
    """As RegMean, with G_k of block l from site k's images sent through the merged blocks 1..l-1 and then through its own block l.

    The sites compute G block by block, one round of messages for each, between which the server merges a block. Embeddings
    and norms are means. Where sources differ: FusionBench leaves the last norm at theta_0's; here it is a mean as all others.
    Worked example: with one block it is RegMean.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> a, b = ({"weight": torch.tensor([[weight]])} for weight in (0.0, 4.0))
    >>> G = [{"weight": torch.tensor([[gram]])} for gram in (1.0, 3.0)]
    >>> fedmerge.merge(model, [a, b], "regmean_pp", statistics={"gram_rounds": G})["weight"]
    tensor([[3.0000]])
    """

    paper: ClassVar[str] = "Nguyen et al., RegMean++, 2025"
    needs: ClassVar[frozenset[str]] = frozenset({"gram_rounds"})
    statistic: ClassVar[str] = "gram_rounds"

    mode: Literal["site", "target"] = Field("site", description="images that pass through the layers")
    ratio: float = Field(0.95, gt=0, le=1, description="factor of the elements of G off the diagonal; as in the uploads")
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
