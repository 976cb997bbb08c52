"""How far predictions can be trusted, told by how much models that fail in different ways agree. No labels, no forwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TEMPERATURES = 2 ** (torch.arange(-12, 9, dtype=torch.float64) / 4)
"""From 1/8 to 4."""


def answers_alike(log_p: Tensor, others: Sequence[Tensor]) -> Tensor:
    """For each image, the share of other models that give the same answer.

    Parameters
    ----------
    log_p : Tensor
        (N, C), of one model.
    others : Sequence[Tensor]
        (N, C) of each other model.

    Returns
    -------
    Tensor
        (N,), in [0, 1].

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.agreement import answers_alike
    >>> one, *others = torch.tensor([[[0.9, 0.1]], [[0.6, 0.4]], [[0.2, 0.8]]]).log()
    >>> answers_alike(one, others)
    tensor([0.5000], dtype=torch.float64)
    """
    answer = log_p.argmax(1)
    return torch.stack([other.argmax(1) == answer for other in others]).double().mean(0).cpu()


def confidences(log_p: Tensor) -> Tensor:
    """max_c softmax(log p / T)_c at every temperature T of a grid, summed over images.

    Parameters
    ----------
    log_p : Tensor
        (N, C).

    Returns
    -------
    Tensor
        (21,), each in [N/C, N].

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.agreement import confidences
    >>> sure = confidences(torch.tensor([[0.9, 0.1]]).log())
    >>> sure.shape, bool(sure[0] > sure[-1])  # the higher the temperature, the less sure
    (torch.Size([21]), True)
    """
    scaled = log_p.double().cpu() / TEMPERATURES[:, None, None]
    return scaled.softmax(-1).amax(-1).sum(1)


def temperature(agreed: Tensor, sure: Tensor) -> float:
    """The geometric mean of 1 and the temperature at which a model is as sure as others agree with it.

    Agreement is accuracy where models err independently, and more than accuracy where they err alike, as merges of the same experts
    do: hence half the way, in logarithms.

    Parameters
    ----------
    agreed : Tensor
        Sum of `answers_alike` over images, a scalar.
    sure : Tensor
        Sum of `confidences` (21,) over the same images.

    Returns
    -------
    float
        A temperature greater than 0.

    References
    ----------
    Jiang et al., Assessing generalization via disagreement, ICLR 2022.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.agreement import answers_alike, confidences, temperature
    >>> one, other = torch.tensor([[0.99, 0.01]] * 4).log(), torch.tensor([[0.9, 0.1]] * 3 + [[0.1, 0.9]]).log()
    >>> agreed = answers_alike(one, [other]).sum()  # on three of four images
    >>> temperature(agreed, confidences(one)) > 1  # it is too sure
    True
    """
    return float(TEMPERATURES[(sure - agreed).abs().argmin()].sqrt())
