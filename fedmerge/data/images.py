"""The record of images that every room shares, and their way into a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.data.cache import VALUES, let_go, mapped_from
from fedmerge.errors import DataError

if TYPE_CHECKING:  # processes that decode images do without
    import torch
    from torch import Tensor


IN_CACHE = 2**18
"""Values that are normalized at a time: passes over what stays in a processor's cache take half the time, with the same bits."""


@dataclass(frozen=True)
class Images:
    """Images of one owner.

    Attributes
    ----------
    pixels : NDArray[Any]
        (N, H, W, C), uint8 once a scanner has taken them; int16 Hounsfield units before, for CT. Nobody writes to them: they
        may lie on disk.
    labels : NDArray[np.int64]
        (N,) in [0, len(classes)).
    domains : NDArray[np.int64]
        (N,) in [0, len(domain_names)): plane, laboratory, ... of each image.
    groups : NDArray[np.int64]
        (N,); images of one group (one patient) are never split.
    classes : tuple[str, ...]
        Names, in label order.
    domain_names : tuple[str, ...]
        Names, in domain order.
    flips : bool
        Whether a horizontal flip preserves the label.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.data.images import Images
    >>> pixels, labels, zeros = np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 1, 0]), np.zeros(4, np.int64)
    >>> images = Images(pixels, labels, zeros, np.arange(4), ("benign", "malignant"), ("leitz",), flips=True)
    >>> images.of_classes(["malignant"]).pixels.shape
    (2, 8, 8, 1)
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

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that the pixels take; none where they are read from disk as they are needed."""
        return self.pixels.nbytes if mapped_from(self.pixels) is None else 0

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


@dataclass(frozen=True)
class Normalized:
    """Images as a model sees them, made of their pixels batch by batch: an index gives a tensor (n, C, H, W), as of `to_batch`.

    pixels: (N, H, W, C) uint8. rows: (M,), which of them, in order. device: where the tensors are to be.
    """

    pixels: NDArray[Any]
    rows: NDArray[np.int64]
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, C, H, W)."""
        _, height, width, channels = self.pixels.shape
        return len(self.rows), channels, height, width

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return self.batch(index)

    def batch(self, index: Tensor | slice, out: Tensor | None = None) -> Tensor:
        """What an index gives. out: a tensor (n or more, C, H, W) on the CPU whose first rows take it on its way to the device."""
        rows = self.rows[index if isinstance(index, slice) else index.numpy()]
        pixels = self.pixels[rows]
        if out is None:
            x = to_batch(pixels, self.mean, self.std, device=self.device)
        else:
            x = to_batch(pixels, self.mean, self.std, out[: len(rows)]).to(self.device)
        let_go(self.pixels)
        return x

    def split(self, size: int) -> Iterator[Tensor]:
        """One batch after the other, as of a tensor."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def chosen(self, index: Tensor) -> Normalized:
        """Those at `index` (n,), in that order."""
        return replace(self, rows=self.rows[index.numpy()])

    def to(self, device: torch.device | str) -> Normalized:
        """The same, with tensors on a device."""
        return replace(self, device=device)


def at_a_time(images: Tensor | Normalized, most: int) -> int:
    """Images (N, C, H, W) that go through a model at a time: `most`, or fewer large ones, which would fill the memory."""
    return max(1, min(most, VALUES // prod(images.shape[1:])))


def to_batch(
    pixels: NDArray[Any] | Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    out: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(N, H, W, C) uint8 to a normalized (N, C, H, W) float32 tensor: (pixel / 255 - mean) / std per channel. out: takes it.

    device: where it is wanted; bytes travel there, a fourth of the floats.
    """
    import torch

    held = torch.from_numpy(np.require(pixels, None, ["C", "W"])) if isinstance(pixels, np.ndarray) else pixels
    given = held.to(device, non_blocking=True).permute(0, 3, 1, 2)
    x = torch.empty(given.shape, device=device) if out is None else out
    mean_of, std_of = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))
    some = max(1, IN_CACHE // prod(given.shape[1:])) if x.device.type == "cpu" else max(1, len(x))
    for of, part in zip(torch.split(given, some), torch.split(x, some), strict=True):
        part.copy_(of).div_(255).sub_(mean_of).div_(std_of)
    return x
