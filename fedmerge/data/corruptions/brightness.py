"""Another level of the window, or another lamp: all of the image brighter or darker."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, TwoWays


class Brightness(TwoWays):
    """x plus or minus s, by a coin for each image; as published by MedMNIST-C x times s, by ImageNet-C value plus s.

    The value of a color is its largest channel; hue and saturation stay. ImageNet-C has no darker images.
    """

    strengths = (0.08, 0.14, 0.2, 0.28, 0.36)
    published = {
        "pathology": (0.85, 0.8, 0.75, 0.72, 0.7),
        "tissue": (0.8, 0.7, 0.6, 0.5, 0.4),
        "ultrasound": (0.55, 0.5, 0.45, 0.4, 0.3),
        **dict.fromkeys(("blood", "dermatoscope", "fundus", "chest", "pneumonia"), (0.9, 0.8, 0.7, 0.6, 0.5)),
        "ct": (0.8, 0.75, 0.7, 0.65, 0.6),
    }
    upward = {
        "photograph": (0.1, 0.2, 0.3, 0.4, 0.5),
        "pathology": (1.1, 1.15, 1.2, 1.22, 1.25),
        "blood": (1.1, 1.2, 1.3, 1.35, 1.4),
        "tissue": (1.3, 1.4, 1.5, 1.6, 1.7),
        "ultrasound": (1.4, 1.5, 1.6, 1.8, 2.0),
        **dict.fromkeys(("dermatoscope", "chest", "pneumonia"), (1.1, 1.2, 1.3, 1.4, 1.5)),
        "ct": (1.2, 1.3, 1.4, 1.5, 1.6),
    }

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """The same step or factor for every pixel."""
        if not self.as_published:
            return x + np.float32(self.amount * self.sign(rng))
        amount = np.float32(self.toward(rng))
        if self.table != "photograph":
            return x * amount
        value = x.max(2, keepdims=True)
        raised = np.minimum(value + amount, 1)
        found: Float = np.where(value > 0, x * raised / np.maximum(value, 1e-6), raised)
        return found
