"""Another contrast: an image nearer to its own mean, or farther from it."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fedmerge.data.corruptions._base import Direction, Float, TwoWays

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in the gray of an image (ITU-R BT.601)."""


class Contrast(TwoWays):
    """m + s (x - m), or upward of ours m + (x - m) / s, m the image's mean.

    It is that of all channels; as published by ImageNet-C, of each channel; by MedMNIST-C, of the image's gray, in 8 bits.
    """

    strengths = (0.75, 0.55, 0.4, 0.28, 0.18)
    published = {
        "photograph": (0.4, 0.3, 0.2, 0.1, 0.05),
        "pathology": (0.8, 0.7, 0.6, 0.55, 0.5),
        "blood": (0.9, 0.8, 0.7, 0.6, 0.5),
        "dermatoscope": (0.8, 0.7, 0.6, 0.5, 0.4),
        "oct": (0.6, 0.4, 0.3, 0.2, 0.15),
        **dict.fromkeys(("fundus", "tissue", "ultrasound", "chest", "pneumonia"), (0.9, 0.8, 0.7, 0.6, 0.4)),
        "ct": (0.8, 0.7, 0.6, 0.55, 0.5),
    }
    upward = {
        **dict.fromkeys(("pathology", "dermatoscope", "tissue", "chest", "pneumonia"), (1.1, 1.2, 1.3, 1.4, 1.6)),
        "blood": (1.1, 1.15, 1.2, 1.25, 1.3),
        "ct": (1.3, 1.4, 1.6, 1.7, 1.8),
    }

    direction: Direction = Field("down", description="less contrast, more, or drawn for each image")

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """About the mean."""
        if not self.as_published:
            mean, factor = x.mean(dtype=np.float32), self.amount ** -self.sign(rng)
        else:
            gray = x @ LUMA if x.shape[2] == 3 else x.mean(2)
            mean = x.mean((0, 1)) if self.table == "photograph" else np.rint(gray.mean() * 255) / np.float32(255)
            factor = self.toward(rng)
        found: Float = mean + np.float32(factor) * (x - mean)
        return found
