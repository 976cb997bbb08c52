"""The way of pixels into a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmerge.data.images import IN_CACHE, to_batch


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (5, 300, 300, 3), (7, 16, 16, 1)])
def test_a_batch_is_normalized_value_by_value_however_large_it_is(shape: tuple[int, ...]) -> None:
    """Large images go in parts: the bits are those of the whole."""
    assert shape[0] != 5 or np.prod(shape) > 2 * IN_CACHE
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    mean, std = (0.485, 0.456, 0.406)[: shape[-1]], (0.229, 0.224, 0.225)[: shape[-1]]
    whole = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    whole = (whole - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)
    found = to_batch(pixels, mean, std)
    assert torch.equal(found, whole) and found.is_contiguous()
    taken = torch.full(whole.shape, torch.nan)
    assert to_batch(pixels, mean, std, taken) is taken
    assert torch.equal(taken, whole)
