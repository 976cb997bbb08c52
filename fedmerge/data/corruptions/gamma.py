"""Another tone curve of the display or the film."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, TwoWays


class Gamma(TwoWays):
    """x^s, s above 1 (up: darker) or below (down), by a coin for each image; of ours x^s or x^(1/s)."""

    strengths = (1.25, 1.5, 1.9, 2.5, 3.2)
    published = dict.fromkeys(("ct", "chest", "pneumonia"), (0.9, 0.8, 0.7, 0.6, 0.4))
    upward = {"ct": (1.3, 1.4, 1.6, 1.8, 2.0), **dict.fromkeys(("chest", "pneumonia"), (1.1, 1.2, 1.3, 1.4, 1.6))}

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """Black and white stay as they are."""
        exponent = self.toward(rng) if self.as_published else self.amount ** self.sign(rng)
        found: Float = x ** np.float32(exponent)
        return found
