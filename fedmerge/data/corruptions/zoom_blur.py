"""The lens moved towards the patient: a mean of the image at growing sizes."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import affine_transform

from fedmerge.data.corruptions._base import Float, Shift

STEPS = ((0.11, 0.01), (0.16, 0.01), (0.21, 0.02), (0.26, 0.02), (0.31, 0.03))


class ZoomBlur(Shift):
    """Mean of the image and of its enlargements about the center by 1, 1 + step, ... below 1 + s, bilinear."""

    published = dict.fromkeys(("photograph", "dermatoscope"), STEPS)

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """The same for all images."""
        most, step = self.amount
        factors = np.arange(1, 1 + most, step)
        total, middle = x.astype(np.float64), (np.array([*x.shape[:2], 1.0]) - 1) / 2
        for factor in factors:
            shrink = np.array([1 / factor, 1 / factor, 1.0])
            total = total + affine_transform(x, shrink, middle - shrink * middle, order=1, mode="nearest")
        found: Float = (total / (len(factors) + 1)).astype(np.float32)
        return found
