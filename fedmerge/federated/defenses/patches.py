"""Does a small square in a corner make an expert say one class, whatever the image shows?"""

from __future__ import annotations

from itertools import product
from typing import ClassVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedmerge.data.corruptions.patch import TONES, Corner, Patch
from fedmerge.federated.defenses._base import Defense, Exhibit, Finding
from fedmerge.merging.scoring.outliers import others_median

IMAGES = 96
"""Of the probe: each is run twelve times more."""


class Patches(Defense):
    """The largest share of probe images that any of twelve patches turns to one class: three tones, four corners.

    It finds backdoors whose trigger looks like one of these, and no others.
    """

    probe: ClassVar[bool] = True
    views: ClassVar[int] = len(TONES) * len(get_args(Corner))

    most: float = Field(0.5, gt=0, le=1, description="largest share of images turned to one class that is not odd")
    multiple: float = Field(
        2.5, ge=1, description="largest multiple of the others' median that is not odd; both bounds must be passed"
    )
    severity: int = Field(3, ge=1, le=5, description="size of the patches: a severity of the shift patch")

    def judge(self, exhibit: Exhibit) -> list[Finding]:
        """Odd is who breaks both bounds."""
        plain = exhibit.logits()[:, :IMAGES].argmax(-1)
        found = torch.zeros(len(exhibit.names))
        for tone, corner in product(TONES, get_args(Corner)):
            patch = Patch(severity=self.severity, corner=corner, tone=tone)

            def stamped(pixels: NDArray[np.uint8], patch: Patch = patch) -> NDArray[np.uint8]:
                return patch.shifted(pixels[:IMAGES], np.arange(len(pixels[:IMAGES])), "probe", 0)

            after = exhibit.logits((tone, corner, self.severity), stamped)
            found = torch.maximum(found, turned(plain, after.argmax(-1), after.shape[-1]))
        bounds = torch.maximum(torch.full_like(found, self.most), self.multiple * others_median(found))
        return [
            Finding(site, self.kind(), share, bound, share / bound, f"a patch turns {share:.0%} to one class; most {bound:.0%}")
            for site, share, bound in zip(exhibit.names, found.tolist(), bounds.tolist(), strict=True)
        ]


def turned(before: Tensor, after: Tensor, classes: int) -> Tensor:
    """Largest share (K,) of images that went to one class from another. before, after: predictions (K, n)."""
    moved = torch.nn.functional.one_hot(after, classes) * (before != after)[..., None]
    return moved.float().mean(1).amax(-1)
