"""Out of focus: a Gaussian point spread."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from fedmerge.data.corruptions._base import Float, Shift


class Blur(Shift):
    """Convolution with a Gaussian of sigma s, a share of the shorter side; as published, pixels of 224.

    MedMNIST-C gives the width k of a kernel, whose sigma in torchvision is 0.15 k + 0.35.
    """

    strengths = (0.018, 0.026, 0.036, 0.048, 0.064)
    published = {
        "photograph": (1, 2, 3, 4, 6),
        "tissue": tuple(0.15 * k + 0.35 for k in (13, 15, 17, 21, 25)),
        **dict.fromkeys(("chest", "pneumonia"), tuple(0.15 * k + 0.35 for k in (3, 5, 7, 9, 11))),
        "ct": tuple(0.15 * k + 0.35 for k in (11, 13, 15, 17, 21)),
    }

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """The same blur for all images."""
        sigma = self.amount * (self.pixels(x) if self.as_published else min(x.shape[:2]))
        found: Float = gaussian_filter(x, (sigma, sigma, 0), mode="nearest")
        return found
