"""Air bubbles under the cover slip: bright discs with a dark rim."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class Bubbles(Shift):
    """s discs at drawn places, radius 0.04 to 0.1 of the shorter side."""

    strengths = (1, 2, 4, 7, 11)

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """Inside, the image is washed out; on the rim it is dark."""
        rows, columns = np.mgrid[: x.shape[0], : x.shape[1]]
        side, found = min(x.shape[:2]), x.copy()
        for _ in range(int(self.strength)):
            v, u, radius = rng.uniform(0, x.shape[0]), rng.uniform(0, x.shape[1]), rng.uniform(0.04, 0.1) * side
            away = np.hypot(rows - v, columns - u) / radius
            found[away < 1] = 0.4 * found[away < 1] + np.float32(0.55)
            found[(away >= 1) & (away < 1.3)] *= np.float32(0.45)
        return found
