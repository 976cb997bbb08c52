"""Label-preserving views of a normalized batch (N, channels, H, W). They draw no random numbers, so a run can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

View = Literal["flip_or_shift", "hflip", "shift", "contrast", "brightness", "crop", "none"]


def _hflip(x: Tensor) -> Tensor:
    """Left and right exchanged. Not label-preserving where left and right organs are classes of their own."""
    return x.flip(-1)


def _shift(x: Tensor) -> Tensor:
    """Moved by 4% of the side to the right and upwards; what comes in is a reflection."""
    height, width = x.shape[-2:]
    down, right = max(1, round(0.04 * height)), max(1, round(0.04 * width))
    return F.pad(x, (right, 0, 0, down), mode="reflect")[..., down:, :width]


def _contrast(x: Tensor) -> Tensor:
    """Deviations from each image's mean grown by 10%."""
    mean = x.mean(dim=(-3, -2, -1), keepdim=True)
    return mean + 1.1 * (x - mean)


def _brightness(x: Tensor) -> Tensor:
    """A tenth of each image's standard deviation added everywhere."""
    return x + 0.1 * x.std(dim=(-3, -2, -1), keepdim=True)


def _crop(x: Tensor) -> Tensor:
    """The middle 90% of each side, resized back."""
    height, width = x.shape[-2:]
    top, left = round(0.05 * height), round(0.05 * width)
    inner = x[..., top : height - top, left : width - left]
    return F.interpolate(inner, size=(height, width), mode="bilinear", align_corners=False)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "hflip": _hflip,
    "shift": _shift,
    "contrast": _contrast,
    "brightness": _brightness,
    "crop": _crop,
    "none": lambda x: x,
}


def resolve(name: View, flips: bool) -> str:
    """The name of a view: `flip_or_shift` is a flip where that preserves the label, else a shift; other names stand for themselves.

    Parameters
    ----------
    name : View
        As a method asks for it.
    flips : bool
        Whether a horizontal flip preserves the label.

    Returns
    -------
    str
        A name in `VIEWS`.

    Examples
    --------
    >>> from fedmerge.merging.scoring.views import resolve
    >>> resolve("flip_or_shift", flips=True), resolve("flip_or_shift", flips=False)
    ('hflip', 'shift')
    """
    if name == "flip_or_shift":
        return "hflip" if flips else "shift"
    return name
