"""T^3 with one merge for the batch."""

from __future__ import annotations

from typing import ClassVar

from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods.t3 import T3


class T3Batch(T3):
    """Eq. 12-13: lambda_b = (1/N) sum_i lambda'(x_i), then one merge. Extrapolation comes first, for every image by itself.

    Worked example: lambda' = (1, 0.5) gives lambda_b = 0.75.
    """

    cost: ClassVar[str] = "K + 2"

    def coefficients(self, evidence: Evidence) -> Coefficients:
        """alpha (K,), or (K + A,) where the generalist is an anchor; on the simplex."""
        each = super().coefficients(evidence)
        alpha = each.encoder.mean(0)
        return Coefficients(alpha, alpha, each.notes)
