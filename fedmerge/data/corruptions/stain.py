"""Another batch of dye, or another time in the bath: amounts of haematoxylin and eosin differ."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift

# Ruifrok & Johnston, Quantification of histochemical staining by color deconvolution, 2001: optical densities of H, E and DAB.
DYES = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
DYES /= np.linalg.norm(DYES, axis=1, keepdims=True)
LEAST = 1 / 255


class Stain(Shift):
    """Each dye's amount times 1 + s u and plus s u' / 4, u, u' ~ U(-1, 1) (Tellez et al., 2018); color images only."""

    strengths = (0.1, 0.2, 0.32, 0.46, 0.62)
    color = True

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """Colors to dyes by optical density, and back."""
        density = -np.log(np.clip(x.astype(np.float64), LEAST, 1))
        amounts = density @ np.linalg.inv(DYES)
        times, plus = rng.uniform(-self.amount, self.amount, (2, 3))
        found: Float = np.exp(-(amounts * (1 + times) + plus / 4) @ DYES).astype(np.float32)
        return found
