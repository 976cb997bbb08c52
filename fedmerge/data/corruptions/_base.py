"""Shifts of single images at five severities, and a target's images under several of them.

Each family is a file in `data/corruptions/`, written with scipy and Pillow, which the project has anyway. Weighed and left out:
`imagecorruptions` and `medmnistc` (pins on old numpy, OpenCV and ImageMagick), `albumentations` (its successor's licence),
`torchio` (volumes), `kornia` (no medical artifacts). Families follow Hendrycks & Dietterich (ICLR 2019) and Di Salvo et al.
(MedMNIST-C, 2024). Strengths are those that they publish where they publish some, or ours.

Published ones are of `ImageNet-C/imagenet_c/imagenet_c/corruptions.py` (github.com/hendrycks/robustness), under the modality
`photograph`, and of `medmnistc/corruptions/registry.py` (github.com/francescodisalvo05/medmnistc-api), under the modality of each
data set. Both are for images of 224 pixels; lengths are taken as shares of the shorter side, so that they mean the same at 32 and
at 512 pixels: what blurs 1 pixel in 224 does next to nothing at 32. `pixelate`, `resolution`, `jpeg` and noises act on pixels, as
detectors do. Nothing is published for `bias_field`, `ghosting`, `hair`, `patch`, `resolution` and `stain`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmerge.errors import Problem
from fedmerge.registry import Folder, Plugin
from fedmerge.rng import generator

Float = NDArray[np.float32]
SEVERITIES = (1, 2, 3, 4, 5)

Modality = Literal[
    "photograph", "pathology", "blood", "dermatoscope", "fundus", "tissue", "oct", "ultrasound", "chest", "pneumonia", "ct"
]  # fmt: skip
"""ImageNet, and the data sets of MedMNIST: Path, Blood, Derma, Retina, Tissue, OCT, Breast, Chest, Pneumonia, OrganA/C/S."""

Strength = Literal["published", "own"]
PUBLISHED_SIDE = 224
"""Pixels of the side of the images for which lengths are published."""


class Shift(Plugin):
    """One family at one severity. color: whether it needs 3 channels.

    strengths: what severities 1 to 5 mean to the family by our own choice; none where only others have chosen. published: the same
    by modality as the sources have it; the first stands for modalities for which there is nothing. borrowed: whether the sources
    have those constants for another family.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.data.corruptions._base import SHIFTS
    >>> gray = np.full((2, 1, 1, 1), 128, np.uint8)
    >>> shift = SHIFTS.load("gamma")(severity=3, strength="own")
    >>> shift.name, shift.shifted(gray, np.arange(2), owner="mercy", seed=0).ravel()
    ('gamma 3', array([177,  69], dtype=uint8))
    """

    strengths: ClassVar[tuple[Any, ...]] = ()
    published: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    color: ClassVar[bool] = False
    borrowed: ClassVar[bool] = False

    severity: int = Field(3, ge=1, le=5, description="strength of the shift, from 1 (hardly visible) to 5 (strong)")
    strength: Strength = Field("published", description="source of the constants: published ones if there are any, or our own")
    modality: Modality | None = Field(
        None,
        description="modality of the published constants, if the family has some for it; default: ImageNet-C's, else the first",
    )

    @property
    def as_published(self) -> bool:
        """Whether the constants are a source's."""
        return bool(self.published) and (self.strength == "published" or not self.strengths)

    @property
    def table(self) -> str:
        """The modality whose published constants are taken."""
        return self.modality if self.modality and self.modality in self.tables else next(iter(self.tables))

    @property
    def tables(self) -> Mapping[str, tuple[Any, ...]]:
        """Published constants by modality."""
        return self.published

    @property
    def amount(self) -> Any:
        """What the severity means, in the family's own unit."""
        return (self.tables[self.table] if self.as_published else self.strengths)[self.severity - 1]

    def pixels(self, x: Float) -> float:
        """What a published length of one pixel is in this image, by its shorter side."""
        return float(min(x.shape[:2])) / PUBLISHED_SIDE

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


Direction = Literal["both", "up", "down"]


class TwoWays(Shift):
    """A family that goes up or down. published: constants for down; upward: those for up; a table may lack one of them."""

    upward: ClassVar[Mapping[str, tuple[float, ...]]] = {}

    direction: Direction = Field(
        "both", description="direction of the change: up, down, or drawn for each image; if only one is published, that one"
    )

    @property
    def tables(self) -> Mapping[str, tuple[Any, ...]]:
        """Of each modality, constants of the way that is wanted, or else of the other."""
        first, second = (self.published, self.upward) if self.direction == "down" else (self.upward, self.published)
        every = dict.fromkeys(("photograph", *first, *second))
        return {one: first.get(one) or second[one] for one in every if one in first or one in second}

    def sign(self, rng: np.random.Generator) -> int:
        """1 for up and -1 for down, by a coin for each image where both are wanted."""
        return int(rng.choice([-1, 1])) if self.direction == "both" else {"up": 1, "down": -1}[self.direction]

    def toward(self, rng: np.random.Generator) -> float:
        """The published constant of the direction."""
        tables = {"down": self.published.get(self.table, ()), "up": self.upward.get(self.table, ())}
        there = {way: table for way, table in tables.items() if table}
        ways = [way for way in there if self.direction in (way, "both")] or list(there)
        way = ways[int(rng.integers(2))] if len(ways) == 2 else ways[0]
        return float(there[way][self.severity - 1])


def mismatched(shifts: Sequence[Shift], channels: int, key: str) -> list[Problem]:
    """Shifts of colors that meet images without colors."""
    return [
        Problem("", key, f"'{name}' on images of 1 channel", "images of 3 channels", "Leave it out, or give the model in_chans: 3")
        for name in dict.fromkeys(shift.kind() for shift in shifts if shift.color and channels != 3)
    ]


SHIFTS: Folder[Shift] = Folder("fedmerge.data.corruptions", Shift, "shift")  # type: ignore[type-abstract]


def published_for(modality: Modality) -> tuple[str, ...]:
    """Families that have published constants of this modality: for those of MedMNIST-C, the corruptions that it applies to it.

    It counts brightness, contrast and gamma up and down as two each; here a coin decides for each image.
    """
    return tuple(name for name in SHIFTS.names if modality in SHIFTS.load(name)().tables and not SHIFTS.load(name).borrowed)
