"""Another tone curve of the display or the film."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class Gamma(Shift):
    """x^s or x^(1/s), by a coin for each image."""

    strengths = (1.25, 1.5, 1.9, 2.5, 3.2)

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """Black and white stay as they are."""
        found: Float = x ** np.float32(self.strength ** rng.choice([-1, 1]))
        return found
