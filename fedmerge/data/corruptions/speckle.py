"""Noise of coherent waves, as in ultrasound: the brighter, the noisier."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class Speckle(Shift):
    """x + s x z, z ~ N(0, 1)."""

    published = {
        "photograph": (0.15, 0.2, 0.35, 0.45, 0.6),
        **dict.fromkeys(("dermatoscope", "chest"), (0.05, 0.15, 0.2, 0.35, 0.45)),
        **dict.fromkeys(("fundus", "ultrasound"), (0.1, 0.15, 0.2, 0.25, 0.3)),
        "oct": (0.15, 0.3, 0.4, 0.5, 0.6),
        "pneumonia": (0.05, 0.07, 0.1, 0.15, 0.2),
        "ct": (0.05, 0.1, 0.2, 0.3, 0.4),
    }

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """White noise on every channel."""
        return x + x * np.float32(self.amount) * rng.standard_normal(x.shape, dtype=np.float32)
