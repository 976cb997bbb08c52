"""A bright square in a corner, as a sticker or a scanner's mark would leave it; also the trigger of a backdoor."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedmerge.data.corruptions._base import Float, Shift

Corner = Literal["upper-left", "upper-right", "lower-left", "lower-right"]
TONES = ("bright", "dark", "chequered")


class Patch(Shift):
    """A square of side s, a share of the image's shorter side and at least one pixel."""

    strengths = (0.06, 0.09, 0.125, 0.18, 0.25)

    corner: Corner = Field("lower-right", description="corner of the patch")
    tone: Literal["bright", "dark", "chequered"] = Field(
        "bright", description="color of the patch: white, black, or pixels of both in turn"
    )

    def on(self, x: Float, rng: np.random.Generator) -> Float:
        """Nothing but the corner changes."""
        side = max(1, round(self.amount * min(x.shape[:2])))
        rows = slice(None, side) if self.corner.startswith("upper") else slice(-side, None)
        columns = slice(None, side) if self.corner.endswith("left") else slice(-side, None)
        chequers = np.indices((side, side)).sum(0)[..., None] % 2 == 0
        found = x.copy()
        found[rows, columns] = {"bright": 1, "dark": 0, "chequered": chequers}[self.tone]
        return found
