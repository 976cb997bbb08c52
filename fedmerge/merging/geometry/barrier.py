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
    """Points of the line between two experts at which the loss is measured.

    Parameters
    ----------
    points : int, default POINTS
        Their number, at least 2.

    Returns
    -------
    Tensor
        (points,) float64, from 0, the second expert, to 1, the first.

    Examples
    --------
    >>> from fedmerge.merging.geometry.barrier import line
    >>> line(points=5)
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    return torch.linspace(0, 1, points, dtype=torch.float64)


def barrier(losses: Tensor, form: Literal["chord", "mean"] = "chord") -> Tensor:
    """Height of the hill on a path between two models; negative where the path dips.

    chord: max_a L(a) - (a L(1) + (1 - a) L(0)), which counts the ends and so is never negative.
    mean: max_a L(a) - (L(0) + L(1)) / 2.

    Parameters
    ----------
    losses : Tensor
        Losses (..., points) along the path, the two ends first and last.
    form : Literal['chord', 'mean'], default 'chord'
        One of the two above.

    Returns
    -------
    Tensor
        (...,), in the unit of the losses.

    References
    ----------
    Chord: Entezari et al., The role of permutation invariance in linear mode connectivity, ICLR 2022, definition 2.2. mean:
    Frankle et al., Linear mode connectivity and the lottery ticket hypothesis, ICML 2020, section 2.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.geometry.barrier import barrier
    >>> losses = torch.tensor([1.0, 4.0, 3.0])  # of one model, halfway, of the other
    >>> barrier(losses)
    tensor(2.)
    """
    first, last = losses[..., :1], losses[..., -1:]
    if form == "mean":
        return losses.max(-1).values - ((first + last) / 2)[..., 0]
    a = line(losses.shape[-1]).to(losses)
    return (losses - (a * last + (1 - a) * first)).max(-1).values


def between(bank: Bank, i: int, j: int, part: Part, points: int = POINTS) -> Iterator[tuple[Tensor, Tensor]]:
    """Coefficients along the line from expert j to expert i.

    Parameters
    ----------
    bank : Bank
        The experts.
    i : int
        The expert at the end, from 0.
    j : int
        The expert at the start, from 0.
    part : Part
        What moves; the other part stays halfway, so that neither expert is favored, and BatchNorm statistics move with the
        encoder.
    points : int, default POINTS
        As of `line`.

    Yields
    ------
    tuple[Tensor, Tensor]
        Coefficients (K,) of encoder and head, one pair for each point.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.geometry.barrier import between
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [4.0, -1.0], [2.0, 3.0]))
    >>> bank = Bank.of(model, {"axial": a, "coronal": b}, start)
    >>> for encoder, head in between(bank, 0, 1, "encoder", points=3):
    ...     print(encoder.tolist(), head.tolist())
    [0.0, 1.0] [0.5, 0.5]
    [0.5, 0.5] [0.5, 0.5]
    [1.0, 0.0] [0.5, 0.5]
    """
    unit = torch.eye(bank.K, dtype=torch.float64)
    halfway = (unit[i] + unit[j]) / 2
    for a in line(points):
        moving = a * unit[i] + (1 - a) * unit[j]
        yield (halfway if part == "head" else moving), (halfway if part == "encoder" else moving)
