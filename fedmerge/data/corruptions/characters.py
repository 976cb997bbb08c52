"""Words burnt into the image, as a device writes them."""

from __future__ import annotations

import string

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fedmerge.data.corruptions._base import Float, Shift

LETTER = 30
"""Pixels of 224 that a letter of the source's font (Hershey duplex) is high at a scale of 1, what hangs below the line included."""
FINER = 4
"""How much finer than 224 pixels words are drawn."""


class Characters(Shift):
    """One to s_1 words of 3 to s_2 letters at scales of 0.14 to s_3, each of a drawn color (gray where the image is).

    Numbers and scales are MedMNIST-C's; its font is OpenCV's, and this one Pillow's, drawn finely and brought to the image's size.
    """

    published = {"dermatoscope": ((1, 6, 0.14), (2, 7, 0.15), (3, 8, 0.16), (4, 9, 0.17), (6, 10, 0.18))}

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """One word over the other."""
        words, letters, scale = self.amount
        height, width = x.shape[:2]
        high, wide = (round(side / self.pixels(x)) for side in (height, width))
        found = x
        for _ in range(int(rng.integers(1, words + 1))):
            word = "".join(rng.choice(list(string.ascii_lowercase), int(rng.integers(3, letters + 1))))
            size = LETTER * FINER * int(rng.integers(14, round(100 * scale) + 1)) / 100
            place = rng.integers(10, max(11, wide - 8 * len(word))), rng.integers(10, high - 10)
            canvas = Image.new("L", (wide * FINER, high * FINER))
            font = ImageFont.load_default(size)
            ImageDraw.Draw(canvas).text((place[0] * FINER, place[1] * FINER), word, 255, font, anchor="ls")
            ink = np.asarray(canvas.resize((width, height), Image.Resampling.BOX), np.float32)[..., None] / np.float32(255)
            color = rng.integers(0, 256, x.shape[2]).astype(np.float32) / np.float32(255)
            found = found + ink * (color - found)
        return found
