"""Loss along the straight line between two experts: is there a hill between them, and is it the encoder's or the head's?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from fedmerge.merging.bank.bank import Bank

Part = Literal["both", "encoder", "head"]
POINTS = 21


def line(points: int = POINTS) -> Tensor:
    """Where the line is looked at: (points,) float64 from 0, the second expert, to 1, the first."""
    return torch.linspace(0, 1, points, dtype=torch.float64)


def barrier(losses: Tensor, form: Literal["chord", "mean"] = "chord") -> Tensor:
    """Height (...,) of the hill on paths of losses (..., points), ends first and last; negative where the path dips.

    chord: max_a L(a) - (a L(1) + (1 - a) L(0)) (Entezari et al., The Role of Permutation Invariance in Linear Mode Connectivity,
    ICLR 2022, definition 2.2), which counts the ends and so is never negative. mean: max_a L(a) - (L(0) + L(1)) / 2 (Frankle et
    al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020, section 2).
    """
    first, last = losses[..., :1], losses[..., -1:]
    if form == "mean":
        return losses.max(-1).values - ((first + last) / 2)[..., 0]
    a = line(losses.shape[-1]).to(losses)
    return (losses - (a * last + (1 - a) * first)).max(-1).values


def between(bank: Bank, i: int, j: int, part: Part, points: int = POINTS) -> Iterator[tuple[Tensor, Tensor]]:
    """Coefficients (K,) of encoder and head along the line from expert j to expert i; (points,) of them.

    part: what moves. The other part stays halfway, so that neither expert is favored, and BatchNorm statistics move with the
    encoder.
    """
    unit = torch.eye(bank.K, dtype=torch.float64)
    halfway = (unit[i] + unit[j]) / 2
    for a in line(points):
        moving = a * unit[i] + (1 - a) * unit[j]
        yield (halfway if part == "head" else moving), (halfway if part == "encoder" else moving)
