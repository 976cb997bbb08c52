"""Quantum noise: few photons, so that bright places are noisier than dark ones."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class Shot(Shift):
    """Poisson(s x) / s; s is the number of photons at full brightness."""

    strengths = (250, 120, 60, 30, 15)
    published = {
        "photograph": (60, 25, 12, 5, 3),
        **dict.fromkeys(("dermatoscope", "chest"), (60, 25, 18, 10, 5)),
        "pneumonia": (300, 200, 150, 100, 80),
        "ct": (200, 100, 50, 25, 15),
    }

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """Counts of photons, as shares of full brightness."""
        found: Float = (rng.poisson(self.amount * x) / self.amount).astype(np.float32)
        return found
