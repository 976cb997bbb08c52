"""DaWin with one merge for every image."""

from __future__ import annotations

from torch import Tensor

from fedmerge.merging.methods._base import State
from fedmerge.merging.methods.dawin import Dawin


class DawinSample(Dawin):
    """lambda(x) of Eq. 1 or 2 as it is: no clusters, and an exact merge for each image, run as one batch (merge/mixture.py).

    Worked example: H = (0, ln 3) for an image: its model is 0.75 theta_1 + 0.25 theta_2.
    """

    def _grouped(self, rows: Tensor, seen: State) -> Tensor:
        """Every image on its own."""
        return rows
