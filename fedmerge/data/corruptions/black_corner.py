"""A round aperture, as of a dermatoscope: black beyond it."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class BlackCorner(Shift):
    """Black outside of a circle about the center, of s times half the shorter side.

    In the source severity 4 (0.90) has the smaller circle than severity 5 (0.95); so it has here.
    """

    published = {"dermatoscope": (1.10, 1.05, 1.00, 0.90, 0.95)}

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """The same for all images."""
        height, width = x.shape[:2]
        rows, columns = np.mgrid[:height, :width]
        center = height // 2, width // 2
        radius = int(min(*center, height - center[0], width - center[1]) * self.amount)
        inside = (rows - center[0]) ** 2 + (columns - center[1]) ** 2 <= radius**2
        found: Float = x * inside[..., None]
        return found
