"""Large pixels, as from a thumbnail ("digital" in T^3's table)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fedmerge.data.corruptions._base import Float, Shift


class Pixelate(Shift):
    """Means over boxes, s of the pixels on each side left, shown as squares."""

    strengths = (0.7, 0.55, 0.42, 0.33, 0.25)
    published = {
        "photograph": (0.6, 0.5, 0.4, 0.3, 0.25),
        "pathology": (0.8, 0.6, 0.4, 0.3, 0.25),
        "blood": (0.6, 0.5, 0.4, 0.3, 0.25),
        "dermatoscope": (0.7, 0.5, 0.4, 0.3, 0.25),
        "fundus": (0.8, 0.6, 0.5, 0.4, 0.35),
        "tissue": (0.4, 0.3, 0.2, 0.15, 0.1),
        **dict.fromkeys(("oct", "ultrasound", "chest"), (0.3, 0.25, 0.2, 0.15, 0.1)),
        "pneumonia": (0.8, 0.7, 0.6, 0.5, 0.4),
        "ct": (0.7, 0.6, 0.5, 0.4, 0.35),
    }

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """Each channel by itself."""
        height, width, channels = x.shape
        small = max(1, round(self.amount * width)), max(1, round(self.amount * height))
        planes = [Image.fromarray(np.ascontiguousarray(x[..., c])) for c in range(channels)]
        done = [p.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.NEAREST) for p in planes]
        return np.stack([np.asarray(plane, np.float32) for plane in done], -1)
