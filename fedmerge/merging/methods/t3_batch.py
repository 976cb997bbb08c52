"""T^3 with one merge for the batch."""

from __future__ import annotations

from typing import ClassVar

from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods.t3 import T3


class T3Batch(T3):
    """Eq. 12-13: lambda_b = (1/N) sum_i lambda'(x_i), then one merge. Extrapolation comes first, for every image by itself.

    Worked example: lambda' = (1, 0.5) gives lambda_b = 0.75.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> sure, unsure = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.1, 0.2]))
    >>> start = {"weight": torch.zeros(2, 1)}
    >>> adapt = fedmerge.Adapter(model, [sure], "t3_batch", base=start, generalist="theta_0")
    >>> adapt(torch.tensor([[3.0], [0.1]])).argmax(1)
    tensor([0, 0])
    >>> adapt.coefficients.encoder  # of the expert, and of theta_0
    tensor([0.7506, 0.2494], dtype=torch.float64)
    """

    cost: ClassVar[str] = "K + 2"

    def coefficients(self, evidence: Evidence) -> Coefficients:
        """alpha (K,), or (K + A,) where the generalist is an anchor; on the simplex."""
        each = super().coefficients(evidence)
        alpha = each.encoder.mean(0)
        return Coefficients(alpha, alpha, each.notes)
