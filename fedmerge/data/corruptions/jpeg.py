"""Saved with too much compression on the way."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from fedmerge.data.corruptions._base import Float, Shift


class Jpeg(Shift):
    """JPEG of quality s (1 to 95) and back; needs images of 1 or 3 channels."""

    strengths = (40, 25, 15, 9, 5)
    published = {
        "photograph": (25, 18, 15, 10, 7),
        **dict.fromkeys(("pathology", "blood", "ultrasound", "chest", "pneumonia", "ct"), (50, 30, 15, 10, 7)),
        "dermatoscope": (30, 20, 15, 10, 7),
        "fundus": (30, 25, 20, 10, 5),
        "tissue": (25, 20, 15, 10, 7),
        "oct": (30, 15, 10, 7, 5),
    }

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """As Pillow writes it, gray for one channel."""
        pixels = np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if x.shape[2] == 1 else pixels).save(file, "JPEG", quality=int(self.amount))
        back = np.asarray(Image.open(file), np.float32) / np.float32(255)
        return back.reshape(x.shape)
