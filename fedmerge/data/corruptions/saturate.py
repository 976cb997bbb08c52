"""Colors too strong or too weak: another camera, or another dye."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class Saturate(Shift):
    """A color's saturation times a plus b, in 0..1, s = (a, b); hue and value (its largest channel) stay. Color images only.

    ImageNet-C's severities 1 and 2 take color away, and 3 to 5 add it, so that they do not grow farther from the image one by one.
    """

    published = {
        "photograph": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        "pathology": ((1, 0.05), (1, 0.1), (1, 0.15), (1, 0.2), (1, 0.25)),
        "blood": ((1, 0.05), (1, 0.1), (1, 0.15), (1, 0.17), (1, 0.2)),
    }
    color = True

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """As in HSV: channels move away from the value, or towards it. Gray has the hue of red."""
        times, plus = self.amount
        value = x.max(2, keepdims=True)
        below = value - x  # each channel's distance from the value: that times saturation is what HSV has
        spread = below.max(2, keepdims=True)
        shape = np.where(spread > 0, below / np.maximum(spread, 1e-6), np.array([0, 1, 1], np.float32))
        saturation = np.clip(spread / np.maximum(value, 1e-6) * times + plus, 0, 1)
        found: Float = (value * (1 - saturation * shape)).astype(np.float32)
        return found
