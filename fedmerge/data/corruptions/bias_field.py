"""Uneven illumination or coil sensitivity: one side brighter than the other."""

from __future__ import annotations

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class BiasField(Shift):
    """x exp(s b), b a drawn polynomial of degree 2 in the coordinates, scaled to -1..1."""

    strengths = (0.25, 0.4, 0.6, 0.85, 1.2)

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """The same field for all channels."""
        v, u = np.meshgrid(np.linspace(-1, 1, x.shape[0]), np.linspace(-1, 1, x.shape[1]), indexing="ij")
        field = np.tensordot(rng.standard_normal(5), np.stack([u, v, u * v, u * u - 0.5, v * v - 0.5]), 1)
        field /= max(float(np.abs(field).max()), 1e-12)
        found: Float = x * np.exp(self.amount * field).astype(np.float32)[..., None]
        return found
