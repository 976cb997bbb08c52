"""Out of focus: what was a point is a disk."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import convolve, gaussian_filter

from fedmerge.data.corruptions._base import Float, Shift

FINER = 8
"""Points on each side of a pixel, of which those inside of the disk are counted."""


class Defocus(Shift):
    """Mean over a disk of radius s_1 with an edge that is softened by a Gaussian of sigma s_2, both in pixels of 224.

    Of the fundus MedMNIST-C has a sixth severity, (9, 0.6), which is left out.
    """

    published = {
        "photograph": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "pathology": ((3, 0.1), (4, 0.1), (5, 0.2), (6, 0.2), (7, 0.3)),
        "blood": ((2, 0.01), (3, 0.1), (4, 0.1), (5, 0.1), (6, 0.1)),
        "dermatoscope": ((4, 0.1), (5, 0.2), (6, 0.3), (7, 0.4), (8, 0.5)),
        "fundus": ((4, 0.1), (5, 0.2), (6, 0.3), (7, 0.4), (8, 0.5)),
        "oct": ((0.5, 0.6), (1, 0.5), (1.5, 0.1), (2, 0.5), (2.5, 0.1)),
    }

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """The same disk for all images; of a pixel on its edge the share inside counts."""
        radius, sigma = (length * self.pixels(x) for length in self.amount)
        half = int(np.ceil(radius + 3 * sigma + 0.5))
        points = (np.arange((2 * half + 1) * FINER) + 0.5) / FINER - half - 0.5
        inside = points[:, None] ** 2 + points**2 <= max(radius, 1 / FINER) ** 2  # four points at least
        disk = inside.reshape(2 * half + 1, FINER, 2 * half + 1, FINER).mean((1, 3))
        soft = gaussian_filter(disk / disk.sum(), sigma)
        found: Float = convolve(x, (soft / soft.sum()).astype(np.float32)[..., None], mode="mirror")
        return found
