"""Inner products as in `gram`, block by block: each block's inputs come through the blocks that are already merged."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fedmerge.federated.statistics.gram import Gram


class GramRounds(Gram):
    """G of one block in each round (Nguyen et al., RegMean++, 2025, algorithm 1).

    It depends on all experts of the scenario, so a new site means new rounds for all; `ratio` and `ridge` are how the server
    merges a block before the next round, and must be those of the method.
    """

    starts_from: ClassVar[Literal["expert", "theta_0", "rounds"]] = "rounds"

    ratio: float = Field(0.95, gt=0, le=1, description="factor of the elements of G off the diagonal")
    ridge: float = Field(1e-6, gt=0, le=1, description="share of the mean eigenvalue added to the diagonal")
