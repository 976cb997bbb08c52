"""Ghosts of a moving patient, as in magnetic resonance: faint copies along the phase direction."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class Ghosting(Shift):
    """(1 - s) x + s (mean of two copies shifted round by a drawn distance), along rows or columns."""

    strengths = (0.1, 0.18, 0.27, 0.37, 0.48)

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """A quarter to a half of the side away."""
        axis = int(rng.integers(2))
        distance = max(1, int(rng.uniform(0.25, 0.5) * x.shape[axis]))
        copies = (np.roll(x, distance, axis) + np.roll(x, -distance, axis)) / 2
        found: Float = ((1 - self.amount) * x + self.amount * copies).astype(np.float32)
        return found
