"""DaWin with one merge for every image."""

from __future__ import annotations

from torch import Tensor

from fedmerge.merging.methods._base import State
from fedmerge.merging.methods.dawin import Dawin


class DawinSample(Dawin):
    """lambda(x) of Eq. 1 or 2 as it is: no clusters, and an exact merge for each image, run as one batch (per_sample/mixture.py).

    Worked example: H = (0, ln 3) for an image: its model is 0.75 theta_1 + 0.25 theta_2.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> sure, unsure = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.1, 0.2]))
    >>> adapt = fedmerge.Adapter(model, {"sure": sure, "unsure": unsure}, "dawin_sample")
    >>> adapt(torch.tensor([[3.0], [0.0]])).argmax(1)
    tensor([0, 0])
    >>> adapt.coefficients.encoder  # a merge for each image
    tensor([[0.6642, 0.3358],
            [0.5000, 0.5000]], dtype=torch.float64)
    """

    def _grouped(self, rows: Tensor, seen: State) -> Tensor:
        """Every image on its own."""
        return rows
