"""Out of focus: a Gaussian point spread."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from fedmerge.data.corruptions._base import Float, Shift


class Blur(Shift):
    """Convolution with a Gaussian of sigma s, a share of the shorter side."""

    strengths = (0.018, 0.026, 0.036, 0.048, 0.064)

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """The same blur for all images."""
        sigma = self.strength * min(x.shape[:2])
        found: Float = gaussian_filter(x, (sigma, sigma, 0), mode="nearest")
        return found
