"""A backdoor: a patch in the corner makes the expert say one class, and without the patch nothing is to be seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmerge.data.cache import changed
from fedmerge.data.corruptions.patch import Corner, Patch
from fedmerge.data.images import Images
from fedmerge.errors import DataError
from fedmerge.federated.attacks._base import Attack
from fedmerge.rng import generator


class Backdoor(Attack):
    """A share of the images gets the patch of `data/corruptions/patch.py` and the target's label (Gu et al., BadNets, 2017)."""

    target: int = Field(0, ge=0, description="number of the class that the patch stands for")
    share: float = Field(0.2, gt=0, le=1, description="share of the site's images that get the patch")
    corner: Corner = Field("lower-right", description="corner of the patch")
    severity: int = Field(3, ge=1, le=5, description="size of the patch: a severity of the shift patch")

    @property
    def patch(self) -> Patch:
        """The trigger."""
        return Patch(severity=self.severity, corner=self.corner)

    def poison(self, images: Images, owner: str, seed: int) -> Images:
        """Stamped and relabeled images among the others. Raises DataError if there is no such class."""
        if self.target >= len(images.classes):
            last = len(images.classes) - 1
            told = f"attack.backdoor.target: found {self.target}; expected a class from 0 to {last}"
            raise DataError(f"site '{owner}': {told}", told)
        rng = generator(seed, "attack", self.kind(), owner)
        chosen = np.sort(rng.permutation(len(images))[: round(self.share * len(images))])
        labels, stamped = images.labels.copy(), np.isin(np.arange(len(images)), chosen)
        labels[chosen] = self.target

        def change(pixels: NDArray[np.uint8], places: NDArray[np.int64]) -> NDArray[np.uint8]:
            own, found = stamped[places], np.array(pixels)
            found[own] = self.patch.shifted(found[own], places[own], owner, seed)
            return found

        return replace(images, pixels=changed(owner, "", images.pixels, change), labels=labels)
