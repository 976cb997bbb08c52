"""The patient moved: a blur along one direction."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import map_coordinates

from fedmerge.data.corruptions._base import Float, Shift


class Motion(Shift):
    """Mean of the image along a path of length s, a share of the shorter side, in a drawn direction."""

    strengths = (0.05, 0.09, 0.14, 0.2, 0.28)

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """As many positions on the path as it has pixels, five at least; bilinear between pixels."""
        angle = rng.uniform(0, np.pi)
        length = self.strength * min(x.shape[:2])
        path = np.linspace(-0.5, 0.5, max(5, int(np.ceil(length)))) * length
        rows, columns = np.mgrid[: x.shape[0], : x.shape[1]].astype(np.float64)
        blurred = np.zeros_like(x)
        for step in path:
            where = [rows + step * np.sin(angle), columns + step * np.cos(angle)]
            for channel in range(x.shape[2]):
                blurred[..., channel] += map_coordinates(x[..., channel], where, order=1, mode="nearest") / len(path)
        return blurred
