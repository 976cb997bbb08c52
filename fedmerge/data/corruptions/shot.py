"""Quantum noise: few photons, so that bright places are noisier than dark ones."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class Shot(Shift):
    """Poisson(s x) / s; s is the number of photons at full brightness."""

    strengths = (250, 120, 60, 30, 15)

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """Counts of photons, as shares of full brightness."""
        return (rng.poisson(self.strength * x) / self.strength).astype(np.float32)
