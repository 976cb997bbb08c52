"""Shifts of single images at five severities, and a target's images under several of them.

Each family is a file in `data/corruptions/`, written with scipy and Pillow, which the project has anyway. Weighed and left out:
`imagecorruptions` and `medmnistc` (pins on old numpy, OpenCV and ImageMagick), `albumentations` (its successor's licence),
`torchio` (volumes), `kornia` (no medical artifacts). Families follow Hendrycks & Dietterich (ICLR 2019) and Di Salvo et al.
(MedMNIST-C, 2024); strengths are ours. Lengths are shares of the image's side, so that they mean the same at 32 and at 224
pixels; `pixelate`, `resolution`, `jpeg` and noises act on pixels, as detectors do.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmerge.errors import Problem
from fedmerge.registry import Folder, Plugin
from fedmerge.rng import generator

Float = NDArray[np.float32]
SEVERITIES = (1, 2, 3, 4, 5)


class Shift(Plugin):
    """One family at one severity. strengths: what severities 1 to 5 mean to the family. color: whether it needs 3 channels."""

    strengths: ClassVar[tuple[float, float, float, float, float]]
    color: ClassVar[bool] = False

    severity: int = Field(3, ge=1, le=5, description="1 is hardly seen, 5 is hard")

    @property
    def strength(self) -> float:
        """What the severity means, in the family's own unit."""
        return self.strengths[self.severity - 1]

    @property
    def name(self) -> str:
        """Family and severity, as reports call it."""
        return f"{self.kind()} {self.severity}"

    @abstractmethod
    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """One image (H, W, C) in 0..1 under this shift; values outside 0..1 are cut off afterwards."""

    def shifted(self, pixels: NDArray[np.uint8], index: NDArray[np.int64], owner: str, seed: int) -> NDArray[np.uint8]:
        """Images (n, H, W, C) under this shift. index: (n,), their places among the owner's images.

        What happens to an image depends on (seed, owner, index, family) alone, and severities differ in strength alone.
        """
        found = np.empty_like(pixels)
        for i, (image, place) in enumerate(zip(pixels, index.tolist(), strict=True)):
            rng = generator(seed, "shift", self.kind(), owner, place)
            x = self.on(image.astype(np.float32) / np.float32(255), rng)
            found[i] = np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
        return found


def mismatched(shifts: Sequence[Shift], channels: int, key: str) -> list[Problem]:
    """Shifts of colors that meet images without colors."""
    return [
        Problem("", key, f"'{name}' on images of 1 channel", "images of 3 channels", "Leave it out, or give the model in_chans: 3")
        for name in dict.fromkeys(shift.kind() for shift in shifts if shift.color and channels != 3)
    ]


SHIFTS: Folder[Shift] = Folder("fedmerge.data.corruptions", Shift, "shift")  # type: ignore[type-abstract]
