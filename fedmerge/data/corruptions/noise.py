"""Electronic noise of the detector: Gaussian, the same everywhere."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class Noise(Shift):
    """x + s z, z ~ N(0, 1); s is a share of the window's width."""

    strengths = (0.04, 0.08, 0.12, 0.18, 0.26)

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """White noise on every channel."""
        return x + np.float32(self.strength) * rng.standard_normal(x.shape, dtype=np.float32)
