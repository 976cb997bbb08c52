"""The patient moved: a blur along one direction."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import map_coordinates

from fedmerge.data.corruptions._base import Float, Shift


class Motion(Shift):
    """Mean of the image along a path of length s, a share of the shorter side, in a drawn direction.

    As published, s is a radius and a sigma for ImageMagick, in pixels of 224: 2 radius pixels to one side, weighted by half a
    Gaussian, at an angle of at most 45 degrees to the rows.
    """

    strengths = (0.05, 0.09, 0.14, 0.2, 0.28)
    published = {
        "photograph": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "pathology": ((5, 5), (10, 5), (15, 5), (15, 8), (15, 12)),
        "blood": ((3, 3), (5, 5), (10, 5), (10, 7), (10, 9)),
        "dermatoscope": ((10, 5), (15, 5), (15, 8), (15, 12), (20, 15)),
        "fundus": ((8, 5), (15, 5), (15, 8), (15, 12), (20, 15)),
        "oct": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "ultrasound": ((5, 5), (9, 7), (9, 10), (13, 10), (17, 12)),
    }

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """As many positions on the path as it has pixels, five at least; bilinear between pixels."""
        if self.as_published:
            radius, sigma = self.amount
            steps = np.arange(2 * radius + 1)
            angle, path, weights = rng.uniform(-np.pi / 4, np.pi / 4), steps * self.pixels(x), np.exp(-(steps**2) / (2 * sigma**2))
        else:
            angle = rng.uniform(0, np.pi)
            length = self.amount * min(x.shape[:2])
            path = np.linspace(-0.5, 0.5, max(5, int(np.ceil(length)))) * length
            weights = np.ones(len(path))
        rows, columns = np.mgrid[: x.shape[0], : x.shape[1]].astype(np.float64)
        blurred = np.zeros_like(x)
        for step, weight in zip(path, weights / weights.sum(), strict=True):
            where = [rows + step * np.sin(angle), columns + step * np.cos(angle)]
            for channel in range(x.shape[2]):
                blurred[..., channel] += map_coordinates(x[..., channel], where, order=1, mode="nearest") * weight
        return blurred
