"""Labels of other images: a site that mixed up its files, or that wants its expert to know nothing, or the wrong thing."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from fedmerge.data.images import Images
from fedmerge.federated.attacks._base import Attack
from fedmerge.rng import generator


class ShuffledLabels(Attack):
    """`images`: labels are dealt out anew among the images, so that there is nothing to learn but their frequencies.

    `classes`: every class gets another's name, always the same; such an expert is as sure as an honest one, and always wrong.
    """

    among: Literal["images", "classes"] = Field(
        "images", description="what is shuffled: labels among images, or the names of classes"
    )

    def poison(self, images: Images, owner: str, seed: int) -> Images:
        """Other labels, the same pixels."""
        rng = generator(seed, "attack", self.kind(), owner)
        if self.among == "images":
            return replace(images, labels=rng.permutation(images.labels))
        order = rng.permutation(len(images.classes))
        other = np.empty_like(order)
        other[order] = np.roll(order, 1)  # one cycle through all classes: none keeps its name
        return replace(images, labels=other[images.labels].astype(images.labels.dtype))
