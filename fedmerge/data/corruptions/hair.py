"""Hairs or fibres across the image: dark thin curves."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from fedmerge.data.corruptions._base import Float, Shift


class Hair(Shift):
    """s curves of degree 2 from border to border, half a percent to one percent of the side wide, nearly black."""

    strengths = (1, 3, 5, 8, 12)

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """Curves through three drawn points; drawn finely and smoothed, so that they are soft at any size."""
        height, width, _ = x.shape
        ink = np.zeros((height, width), np.float32)
        t = np.linspace(0, 1, 4 * max(height, width))[:, None]
        for _ in range(int(self.strength)):
            start, bend, end = rng.uniform(0, 1, (3, 2))
            edge = int(rng.integers(2))
            start[edge], end[edge] = 0, 1
            curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
            place = np.minimum((curve * [height, width]).astype(int), [height - 1, width - 1])
            ink[place[:, 0], place[:, 1]] = 1
        soft = np.clip(2 * gaussian_filter(ink, 0.008 * min(height, width)), 0, 0.9)
        found: Float = x * (1 - soft[..., None].astype(np.float32))
        return found
