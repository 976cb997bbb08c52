"""Electronic noise of the detector: Gaussian, the same everywhere."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class Noise(Shift):
    """x + s z, z ~ N(0, 1); s is a share of the window's width."""

    strengths = (0.04, 0.08, 0.12, 0.18, 0.26)
    published = {
        "photograph": (0.08, 0.12, 0.18, 0.26, 0.38),
        **dict.fromkeys(("dermatoscope", "chest"), (0.04, 0.08, 0.12, 0.18, 0.26)),
        **dict.fromkeys(("fundus", "ct"), (0.04, 0.08, 0.12, 0.16, 0.20)),
        "pneumonia": (0.04, 0.05, 0.06, 0.07, 0.08),
    }

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """White noise on every channel."""
        return x + np.float32(self.amount) * rng.standard_normal(x.shape, dtype=np.float32)
