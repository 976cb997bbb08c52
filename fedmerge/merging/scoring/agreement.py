"""How far predictions can be trusted, told by how much models that fail in different ways agree. No labels, no forwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TEMPERATURES = 2 ** (torch.arange(-12, 9, dtype=torch.float64) / 4)
"""From 1/8 to 4."""

BINS = 200
"""Of confidences, of equal width in [0, 1]."""


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


def other_answers(log_p: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Images on which other models answer otherwise, by how sure a model is of them.

    Parameters
    ----------
    log_p : Tensor
        (N, C), of the model.
    others : Sequence[Tensor]
        (N, C) of each of M other models.

    Returns
    -------
    Tensor
        (200, 1 + M) float64: in each bin of the model's confidence max_c p(c | x), all images, and those on which each other model
        answers otherwise. Sums over batches are those of the stream.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.agreement import other_answers
    >>> said, other = torch.tensor([[9.0, 0.0], [0.1, 0.0]]).log_softmax(1), torch.tensor([[9.0, 0.0], [0.0, 0.1]]).log_softmax(1)
    >>> other_answers(said, [other]).sum(0)  # two images, one with another answer
    tensor([2., 1.], dtype=torch.float64)
    """
    confidence, answer = log_p.max(1)
    images = [torch.ones_like(answer), *(other.argmax(1) != answer for other in others)]
    bins = (confidence.exp().double().cpu() * BINS).long().clamp(max=BINS - 1)
    return torch.zeros(BINS, 1 + len(others), dtype=torch.float64).index_add(0, bins, torch.stack(images, 1).double().cpu())


def of_the_surest(counts: Tensor) -> Tensor:
    """`other_answers` of the half of the images of which the model is surest; of the bin in the middle, the part that is missing.

    Parameters
    ----------
    counts : Tensor
        (200, 1 + M), of one batch or more.

    Returns
    -------
    Tensor
        (1 + M,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.agreement import of_the_surest, other_answers
    >>> said, other = torch.tensor([[9.0, 0.0], [0.1, 0.0]]).log_softmax(1), torch.tensor([[9.0, 0.0], [0.0, 0.1]]).log_softmax(1)
    >>> of_the_surest(other_answers(said, [other]))  # one of the two images, with the same answer
    tensor([1., 0.], dtype=torch.float64)
    """
    down = counts.flip(0)
    images = down[:, 0]
    missing = images.sum() / 2 - (images.cumsum(0) - images)
    return (down * (missing / images.clamp(min=1e-9)).clamp(0, 1)[:, None]).sum(0)


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
