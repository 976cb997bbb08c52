"""Training augmentation of normalized batches, vectorized, from an explicit generator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fedmerge.federated.messages import Strength


def augment(x: Tensor, strength: Strength, flips: bool, generator: Generator) -> Tensor:
    """A random view of every image of x (N, channels, H, W).

    full: Gulrajani & Lopez-Paz (DomainBed, ICLR 2021): crops of 70% to 100% of the area, flips where they preserve the label,
    jitter of brightness and contrast by 0.3, a tenth of color images gray. light: crops from 85%, jitter by 0.1, no gray.
    """
    if strength == "none":
        return x
    smallest, jitter = (0.7, 0.3) if strength == "full" else (0.85, 0.1)
    n = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)).to(x.device)

    side = uniform(smallest, 1).sqrt()
    x = _crop(x, side, (1 - side) * uniform(-1, 1), (1 - side) * uniform(-1, 1), flips & (uniform(0, 1) < 0.5))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * uniform(1 - jitter, 1 + jitter) + uniform(-jitter, jitter) / 2
    if strength == "full" and x.shape[1] == 3:
        x = torch.where(uniform(0, 1) < 0.1, x.mean(1, keepdim=True).expand_as(x), x)
    return x


def _crop(x: Tensor, side: Tensor, right: Tensor, down: Tensor, flipped: Tensor) -> Tensor:
    """The square of relative side `side`, center (right, down) in [-1, 1], resized to the whole; all (N, 1, 1, 1)."""
    zero = torch.zeros_like(side)
    across = torch.where(flipped, -side, side)
    matrix = torch.cat([across, zero, right, zero, side, down], -1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
