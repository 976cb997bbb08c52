"""A detector of low resolution, shown smoothly."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift
from fedmerge.data.scanner import resampled


class Resolution(Shift):
    """Down to a share s of the pixels on each side with antialiasing, and up again, bilinear."""

    strengths = (0.75, 0.6, 0.48, 0.36, 0.25)

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """The same for all images."""
        found: Float = resampled(x[None], self.amount)[0]
        return found
