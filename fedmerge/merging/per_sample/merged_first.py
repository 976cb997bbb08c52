"""Layers that are cheaper with weights merged for every sample than as a sum over experts, on a CPU.

A layer whose weights each sample uses T times (tokens, pixels of its output) takes T K multiplications for each weight and sample
as a sum over K experts, and about T + 5 (K + 1) with weights that are merged first: what a merge takes in a block that stays in
the cache is as long as about five multiplications for each expert. So the sum is left where T (K - 1) > 5 (K + 1), by shapes
alone. Measured in November 2026, one core, N = 32, milliseconds of (sum, merged first):

    T    weights       K = 4          K = 9
    9    512 x 512     (6.7, 6.9)     (15, 14)
    17   288 x 96      (1.7, 0.9)     (3.3, 1.0)
    36   256 x 256     (7.2, 2.9)     (16, 3.5)
    50   3072 x 768    (358, 137)     (758, 193)
    197  192 x 768     (102, 26)      (230, 32)
    576  24 x 144      (18, 3.7)      (40, 3.6)

Half precision stays a sum, accumulated in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmerge.merging.per_sample.mixed_tensor import Mixed, count, stacked

BLOCK = 2**18
"""Numbers of merged weights that are made at a time: 1 MiB of float32, which a core's cache holds."""

LEAST = 64
"""Rows of a weight below which a block is not cut: products of matrices need some."""

TOGETHER = 8
"""Samples that a block should hold, where these use weights so seldom that what is read of the experts counts."""

MERGE = 5
"""Multiplications of a layer that take as long as one multiplication of a merge, which waits for memory."""

PACKED = 60
"""The same for what a convolution does to arrange a weight before it uses it."""

BY_CHANNEL = 5
"""Multiplications of a product that take as long as one of a convolution of each channel by itself."""

EVER = 2**62
"""Uses beyond every rule."""

NARROW = 16
"""Columns below which a product is several times slower than the same with as many rows."""

GATHERED = 64
"""Pixels of an output up to which its windows are gathered: these are several times the input."""


def can_merge_first(like: Tensor) -> bool:
    """Whether layers of parameters like this one may be merged first at all.

    Parameters
    ----------
    like : Tensor
        Any parameter (...).

    Returns
    -------
    bool
        False on a GPU and for half precision.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.per_sample.merged_first import can_merge_first
    >>> can_merge_first(torch.zeros(1)), can_merge_first(torch.zeros(1, dtype=torch.bfloat16))
    (True, False)
    """
    return like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64)


def merges_first(weight: Mixed, uses: int, besides: int = 0) -> bool:
    """Whether a weight is merged for every sample before its layer runs.

    Parameters
    ----------
    weight : Mixed
        The layer's weight.
    uses : int
        T, how often one sample uses each weight.
    besides : int, default 0
        What the layer does for each merged weight, in multiplications.

    Returns
    -------
    bool
        Where `can_merge_first` allows it, by the rule above.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.per_sample.merged_first import merges_first
    >>> from fedmerge.merging.per_sample.mixed_tensor import Mixed
    >>> weight = Mixed.linear([torch.zeros(2, 2)] * 3, torch.full((4, 3), 1 / 3), owners=("weight",), used=set())
    >>> merges_first(weight, uses=17), merges_first(weight, uses=9)
    (True, False)
    """
    experts = len(weight.pieces)
    if weight.merged is not None or not can_merge_first(weight.pieces[0]):
        return False
    return uses * (experts - 1) > MERGE * (experts + 1) + besides


def own_product(weight: Mixed, x: Tensor, out: Tensor) -> Tensor:
    """x_i W_i^T of every sample, block by block, so that merged weights do not leave the cache.

    Parameters
    ----------
    weight : Mixed
        W (outputs, ...), of which all but the first side are one.
    x : Tensor
        (N, T, inputs).
    out : Tensor
        (N, T, outputs), which is overwritten.

    Returns
    -------
    Tensor
        out.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.per_sample.merged_first import own_product
    >>> from fedmerge.merging.per_sample.mixed_tensor import Mixed
    >>> pieces, weights = [torch.eye(2), torch.ones(2, 2)], torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    >>> weight = Mixed.linear(pieces, weights, owners=("weight",), used=set())
    >>> own_product(weight, torch.tensor([[[1.0, 3.0]], [[1.0, 3.0]]]), torch.empty(2, 1, 2)).flatten(1)
    tensor([[1.0000, 3.0000],
            [2.5000, 3.5000]])
    """
    pieces, shares = _ready(weight)
    inputs, outputs = x.shape[2], len(weight.pieces[0])
    together = TOGETHER if x.shape[1] <= GATHERED else 1
    height = min(outputs, max(LEAST, BLOCK // (inputs * together)))
    some = max(1, BLOCK // (height * inputs))
    for row in range(0, outputs, height):
        flat = pieces[:, row * inputs : (row + height) * inputs]
        for first in range(0, len(x), some):
            samples = slice(first, first + some)
            own = (shares[samples] @ flat).view(-1, flat.shape[1] // inputs, inputs)
            torch.bmm(x[samples], own.transpose(1, 2), out=out[samples, :, row : row + height])
    return out


def own_convolution(func: Any, x: Tensor, weight: Mixed, rest: Sequence[Any], named: dict[str, Any]) -> Tensor | None:
    """conv(x_i, w_i) without a bias, or None where a sum over experts is cheaper.

    Kernels of one pixel, windows that do not overlap, and those of small outputs are products of matrices; others are convolutions
    in which every sample is a group of its own.

    Parameters
    ----------
    func : Any
        The convolution of torch.
    x : Tensor
        (N, channels, ...).
    weight : Mixed
        (outputs, channels / groups, ...).
    rest : Sequence[Any]
        Its other positional arguments, after the bias.
    named : dict[str, Any]
        Those by name.

    Returns
    -------
    Tensor | None
        (N, outputs, ...).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.per_sample.merged_first import own_convolution
    >>> from fedmerge.merging.per_sample.mixed_tensor import Mixed
    >>> pieces, weights = [torch.ones(1, 1, 1, 1), 3 * torch.ones(1, 1, 1, 1)], torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    >>> weight = Mixed.linear(pieces, weights, owners=("weight",), used=set())
    >>> own_convolution(torch.conv2d, torch.ones(2, 1, 8, 8), weight, (), {})[:, 0, 0, 0]
    tensor([1., 2.])
    """
    if len(x) != count(weight) or "transpose" in func.__name__ or x.ndim != weight.ndim or not merges_first(weight, EVER):
        return None
    given = {**dict(zip(("stride", "padding", "dilation", "groups"), rest, strict=False)), **named}
    shape = _Shape.of(x, weight, given)
    windows = _windows(func, x, weight, shape)
    if windows is not None:
        if not merges_first(weight, shape.uses):
            return None
        return _product_of(weight, windows).view(len(x), -1, *shape.out)
    by_channel = weight.shape[1] == 1
    if not merges_first(weight, BY_CHANNEL * shape.uses if by_channel else shape.uses, 0 if by_channel else PACKED):
        return None
    pieces, shares = _ready(weight)
    some, parts = max(1, BLOCK // pieces.shape[1]), []
    for first in range(0, len(x), some):
        samples = slice(first, first + some)
        own = (shares[samples] @ pieces).view(-1, *weight.shape[1:])
        part = x[samples]
        done = func(part.reshape(1, -1, *part.shape[2:]), own, None, **{**given, "groups": shape.groups * len(part)})
        parts.append(done.view(len(part), -1, *done.shape[2:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class _Shape:
    """What a convolution is given beside its operands (edges: padding on both sides together), and the sides of its output."""

    stride: tuple[int, ...]
    edges: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    kernel: tuple[int, ...]
    out: tuple[int, ...]

    @staticmethod
    def of(x: Tensor, weight: Mixed, given: dict[str, Any]) -> _Shape:
        kernel = tuple(weight.shape[2:])
        stride, dilation = (_sides(given.get(name, 1), len(kernel)) for name in ("stride", "dilation"))
        padding = given.get("padding", 0)
        reach = tuple(step * (size - 1) for step, size in zip(dilation, kernel, strict=True))
        sides = _sides(0 if isinstance(padding, str) else padding, len(kernel))
        edges = reach if padding == "same" else tuple(2 * side for side in sides)
        all_sides = zip(x.shape[2:], edges, reach, stride, strict=True)
        out = tuple((size + edge - far - 1) // step + 1 for size, edge, far, step in all_sides)
        return _Shape(stride, edges, dilation, given.get("groups", 1), kernel, out)

    @property
    def uses(self) -> int:
        """Pixels of the output."""
        return math.prod(self.out)


def _windows(func: Any, x: Tensor, weight: Mixed, shape: _Shape) -> Tensor | None:
    """The windows (N, inputs, T) of a convolution that is done as a product, or None."""
    if shape.groups != 1 or any(edge % 2 for edge in shape.edges):
        return None
    if math.prod(shape.kernel) == 1 and not any(shape.edges):
        pixels: tuple[Any, ...] = (..., *(slice(None, None, step) for step in shape.stride))
        return x[pixels].flatten(2)
    few = shape.uses <= GATHERED or (shape.kernel == shape.stride and not any(shape.edges))
    if func is not torch.conv2d or not few or not merges_first(weight, shape.uses):
        return None
    return F.unfold(x, shape.kernel, shape.dilation, tuple(edge // 2 for edge in shape.edges), shape.stride)


def _product_of(weight: Mixed, windows: Tensor) -> Tensor:
    """W_i x_i (N, outputs, T) of windows (N, inputs, T), in memory as these are: channels last, or pixels last."""
    N, inputs, uses = windows.shape
    x, channels_last = windows.transpose(1, 2), windows.stride(1) == 1 and inputs > 1 and uses > 1
    if channels_last or uses < NARROW:
        out = own_product(weight, x.contiguous(), x.new_empty(N, uses, len(weight.pieces[0]))).transpose(1, 2)
        return out if channels_last else out.contiguous()
    out = x.new_empty(N, len(weight.pieces[0]), uses)
    own_product(weight, x, out.transpose(1, 2))
    return out


def _ready(weight: Mixed) -> tuple[Tensor, Tensor]:
    """Pieces in rows (K, ...), and shares (N, K)."""
    weight.used.update(weight.owners)
    pieces = stacked(weight.pieces)
    return pieces.flatten(1), cast(Tensor, weight.weights).to(pieces.dtype)


def _sides(value: int | Sequence[int], sides: int) -> tuple[int, ...]:
    """One number for every side."""
    return (value,) * sides if isinstance(value, int) else tuple(value) * (sides // len(value))
