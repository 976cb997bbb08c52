"""Air bubbles under the cover slip: bright discs with a dark rim."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class Bubbles(Shift):
    """s discs at drawn places, radius 0.04 to 0.1 of the shorter side.

    As published, s is the largest radius, from 3 pixels of 224 on, and the largest number, from 7 on; a bubble is whiter by 100 of
    255, its rim of 2 pixels by 130, and hides those below it.
    """

    strengths = (1, 2, 4, 7, 11)
    published = {
        "pathology": ((7, 15), (10, 15), (12, 15), (15, 20), (17, 25)),
        "blood": ((5, 10), (7, 10), (10, 10), (12, 12), (15, 12)),
    }

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """Inside, the image is washed out; on the rim it is dark."""
        if self.as_published:
            return self._white(x, rng)
        rows, columns = np.mgrid[: x.shape[0], : x.shape[1]]
        side, found = min(x.shape[:2]), x.copy()
        for _ in range(int(self.amount)):
            v, u, radius = rng.uniform(0, x.shape[0]), rng.uniform(0, x.shape[1]), rng.uniform(0.04, 0.1) * side
            away = np.hypot(rows - v, columns - u) / radius
            found[away < 1] = 0.4 * found[away < 1] + np.float32(0.55)
            found[(away >= 1) & (away < 1.3)] *= np.float32(0.45)
        return found

    def _white(self, x: Float, rng: np.random.Generator) -> Float:
        pixel, (largest, most) = self.pixels(x), self.amount
        rows, columns = (np.mgrid[: x.shape[0], : x.shape[1]] + 0.5) / pixel
        high, wide, cover = x.shape[0] / pixel, x.shape[1] / pixel, np.zeros(x.shape[:2], np.float32)
        for _ in range(int(rng.integers(7, most + 1))):
            radius = int(rng.integers(3, largest + 1))
            away = np.hypot(rows - rng.uniform(radius, high - radius), columns - rng.uniform(radius, wide - radius))
            cover[away <= radius + 2] = 130 / 255
            cover[away <= radius] = 100 / 255
        return x + cover[..., None] * (1 - x)
