"""Hairs or fibres across the image: dark thin curves."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt

from fedmerge.data.corruptions._base import Float, Shift

CANVAS = 256
"""Pixels of the shorter side on which curves are drawn, whatever the image's size."""
WIDTH = 0.033
"""Of a hair, as a share of the shorter side."""


class Hair(Shift):
    """s curves of degree 2 from border to border, nearly black, 3 percent of the shorter side wide at any size."""

    strengths = (1, 3, 5, 8, 12)

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """Curves through three drawn points; drawn at one size and brought to the image's, so that they are as dark at any."""
        height, width, _ = x.shape
        canvas = np.rint(np.array([height, width]) * CANVAS / min(height, width)).astype(int)
        away = np.ones(canvas, bool)
        t = np.linspace(0, 1, 4 * int(canvas.max()))[:, None]
        for _ in range(int(self.amount)):
            start, bend, end = rng.uniform(0, 1, (3, 2))
            edge = int(rng.integers(2))
            start[edge], end[edge] = 0, 1
            curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
            place = np.minimum((curve * canvas).astype(int), canvas - 1)
            away[place[:, 0], place[:, 1]] = False
        soft = np.clip((WIDTH * CANVAS / 2 - distance_transform_edt(away)) / 2 + 0.5, 0, 0.9).astype(np.float32)
        way = Image.Resampling.BOX if min(height, width) < CANVAS else Image.Resampling.BILINEAR
        ink = np.asarray(Image.fromarray(soft).resize((width, height), way))
        found: Float = x * (1 - ink[..., None])
        return found
