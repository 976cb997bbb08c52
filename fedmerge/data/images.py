"""The record of images that every room shares, and their way into a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.errors import DataError


@dataclass(frozen=True)
class Images:
    """Images of one owner.

    pixels: (N, H, W, C), uint8 once a scanner has taken them; int16 Hounsfield units before, for CT.
    labels: (N,) int64 in [0, len(classes)).
    domains: (N,) int64 in [0, len(domain_names)): plane, laboratory, ... of each image.
    groups: (N,) int64; images of one group (one patient) are never split.
    flips: whether a horizontal flip preserves the label.
    """

    pixels: NDArray[Any]
    labels: NDArray[np.int64]
    domains: NDArray[np.int64]
    groups: NDArray[np.int64]
    classes: tuple[str, ...]
    domain_names: tuple[str, ...]
    flips: bool

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: NDArray[np.int64]) -> Images:
        """The images at `index` (n,), in that order."""
        return replace(
            self,
            pixels=self.pixels[index],
            labels=self.labels[index],
            domains=self.domains[index],
            groups=self.groups[index],
        )

    def of_classes(self, classes: Sequence[str]) -> Images:
        """The images of these classes alone, whose labels are their places here. Raises DataError if there is none."""
        if tuple(classes) == self.classes:
            return self
        place = np.array([classes.index(name) if name in classes else -1 for name in self.classes], np.int64)
        kept = np.flatnonzero(place[self.labels] >= 0)
        if not len(kept):
            said = f"no image of the {len(classes)} classes that the scenario asks for"
            raise DataError(said, told=said)
        return replace(self.subset(kept), labels=place[self.labels[kept]], classes=tuple(classes))


def numbered(groups: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Groups of several batches, (n_t,) each, as numbers from 0 in the order in which they first appear."""
    _, first, member = np.unique(np.concatenate(groups), return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return np.split(rank[member].astype(np.int64), np.cumsum([len(batch) for batch in groups])[:-1])


def to_batch(pixels: NDArray[Any], mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(N, H, W, C) uint8 to a normalized (N, C, H, W) float32 tensor: (pixel / 255 - mean) / std per channel."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255
    shape = (1, -1, 1, 1)
    return ((x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)).contiguous()
