"""Another level of the window, or another lamp: all of the image brighter or darker."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class Brightness(Shift):
    """x plus or minus s, by a coin for each image."""

    strengths = (0.08, 0.14, 0.2, 0.28, 0.36)

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """The same step for every pixel."""
        return x + np.float32(self.strength * rng.choice([-1, 1]))
