"""How far predictions can be trusted, told by how much models that fail in different ways agree. No labels, no forwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TEMPERATURES = 2 ** (torch.arange(-12, 9, dtype=torch.float64) / 4)
"""From 1/8 to 4."""


def answers_alike(log_p: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Images (N,) on which the answer is that of the others, as the share of the others. All are log p (N, C)."""
    answer = log_p.argmax(1)
    return torch.stack([other.argmax(1) == answer for other in others]).double().mean(0).cpu()


def confidences(log_p: Tensor) -> Tensor:
    """max_c softmax(log p / T)_c at every temperature, summed over images: (21,)."""
    scaled = log_p.double().cpu() / TEMPERATURES[:, None, None]
    return scaled.softmax(-1).amax(-1).sum(1)


def temperature(agreed: Tensor, sure: Tensor) -> float:
    """The geometric mean of 1 and the temperature at which a model is as sure as others agree with it.

    Agreement is accuracy where models err independently (Jiang et al., Assessing generalization via disagreement, ICLR 2022), and
    more than accuracy where they err alike, as merges of the same experts do: hence half the way, in logarithms.

    agreed: sum of `answers_alike`. sure: sum of `confidences`, over the same images.
    """
    return float(TEMPERATURES[(sure - agreed).abs().argmin()].sqrt())
