"""Dead and hot pixels: salt and pepper."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class Impulse(Shift):
    """A share s of all values is black or white, half of it each."""

    published = {
        "photograph": (0.03, 0.06, 0.09, 0.17, 0.27),
        **dict.fromkeys(("dermatoscope", "chest"), (0.01, 0.03, 0.06, 0.09, 0.17)),
        "tissue": (0.01, 0.015, 0.02, 0.025, 0.03),
        "pneumonia": (0.005, 0.01, 0.013, 0.017, 0.02),
        "ct": (0.01, 0.02, 0.03, 0.05, 0.08),
    }

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """Every channel by itself."""
        hit, white = rng.random(x.shape) < self.amount, rng.random(x.shape) < 0.5
        return np.where(hit, white, x).astype(np.float32)
