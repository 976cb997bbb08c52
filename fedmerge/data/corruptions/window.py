"""A window that is too narrow: dark and bright tissue is cut off."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedmerge.data.corruptions._base import Float, Shift


class Window(Shift):
    """s (x - 1/2) + 1/2: a window s times narrower about the same level.

    No source has windows; the published factors are those by which MedMNIST-C raises contrast.
    """

    borrowed: ClassVar[bool] = True
    strengths = (1.2, 1.5, 1.9, 2.4, 3.2)
    published = {
        "ct": (1.3, 1.4, 1.6, 1.7, 1.8),
        **dict.fromkeys(("pathology", "dermatoscope", "tissue", "chest", "pneumonia"), (1.1, 1.2, 1.3, 1.4, 1.6)),
        "blood": (1.1, 1.15, 1.2, 1.25, 1.3),
    }

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """The same window for all images."""
        return np.float32(self.amount) * (x - np.float32(0.5)) + np.float32(0.5)
