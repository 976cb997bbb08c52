"""Dye that has dried on the slide: dark marks."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from fedmerge.data.corruptions._base import Float, Shift


class StainDeposit(Shift):
    """One to s marks at drawn places, nearly black.

    The numbers are MedMNIST-C's. Its marks are cut from photographs (`inks.npz`), which are not here: these are blots of 12 to 30
    pixels of 224, smoothed noise inside a disc, so that figures compare in number and not in shape.
    """

    published = {"pathology": (1, 2, 3, 4, 5), "blood": (1, 2, 3, 3, 3)}

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """Each mark darkens what is below it."""
        pixel, found = self.pixels(x), x.copy()
        rows, columns = (np.mgrid[: x.shape[0], : x.shape[1]] + 0.5) / pixel
        for _ in range(int(rng.integers(1, self.amount + 1))):
            radius, texture = rng.uniform(6, 15), gaussian_filter(rng.standard_normal((32, 32)), 3, mode="wrap")
            v, u = rng.uniform(10 + radius, 214 - radius, 2) * (np.array(x.shape[:2]) / pixel / 224)
            place = tuple(((one / radius + 1) * 16).astype(int) % 32 for one in (rows - v, columns - u))
            ragged = np.hypot(rows - v, columns - u) / radius - 1 + 0.5 * texture[place] / np.abs(texture).max()
            ink = np.clip(-4 * ragged, 0, 0.95)
            found = found * (1 - ink[..., None]).astype(np.float32)
        return found
