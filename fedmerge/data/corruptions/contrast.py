"""Little contrast: an image near its own mean."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class Contrast(Shift):
    """m + s (x - m), m the image's mean."""

    strengths = (0.75, 0.55, 0.4, 0.28, 0.18)

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """About the mean of all channels."""
        mean = x.mean(dtype=np.float32)
        found: Float = mean + np.float32(self.strength) * (x - mean)
        return found
