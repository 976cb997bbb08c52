"""Entropy, divergence, confidence and consistency of class probabilities: the only copies. Natural logarithms, classes on the
last axis."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def log_probabilities(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """log softmax(z / T), in float32 or wider.

    Parameters
    ----------
    logits : Tensor
        z (..., C).
    temperature : Tensor | float, default 1.0
        T, greater than 0; broadcasts against the logits.

    Returns
    -------
    Tensor
        (..., C), nats.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.divergence import log_probabilities
    >>> log_probabilities(torch.tensor([2.0, 0.0]), temperature=2.0).exp()
    tensor([0.7311, 0.2689])
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature, dim=-1)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy H = -sum_c p_c log p_c. A probability that underflows to 0 adds 0.

    Parameters
    ----------
    log_p : Tensor
        (..., C).

    Returns
    -------
    Tensor
        (...), nats in [0, ln C].

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.divergence import entropy
    >>> entropy(torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log())
    tensor([0.6931, 0.3251])
    """
    return -torch.xlogy(log_p.exp(), log_p.exp()).sum(-1).clamp(max=0)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p || q) = sum_c p_c (log p_c - log q_c).

    Parameters
    ----------
    log_p : Tensor
        (..., C).
    log_q : Tensor
        (..., C).

    Returns
    -------
    Tensor
        (...), nats, 0 or more.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.divergence import kl
    >>> kl(torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log())
    tensor(0.3681)
    """
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1).clamp(min=0)


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence H((p+q)/2) - (H(p)+H(q))/2.

    Parameters
    ----------
    log_p : Tensor
        (..., C).
    log_q : Tensor
        (..., C).

    Returns
    -------
    Tensor
        (...), nats in [0, ln 2].

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.divergence import jsd
    >>> jsd(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log())  # ln 2: they have nothing in common
    tensor(0.6931)
    """
    middle = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype, device=log_p.device))
    return (entropy(middle) - (entropy(log_p) + entropy(log_q)) / 2).clamp(min=0)


def confidence(log_p: Tensor) -> Tensor:
    """The probability of the likeliest class, max_c p_c.

    Parameters
    ----------
    log_p : Tensor
        (..., C).

    Returns
    -------
    Tensor
        (...), in [1/C, 1].

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.divergence import confidence
    >>> confidence(torch.tensor([[0.9, 0.1], [0.4, 0.6]]).log())
    tensor([0.9000, 0.6000])
    """
    return log_p.amax(-1).exp()


Consistency = Literal["jsd", "tv", "cos", "agree", "kl"]


def consistency(name: Consistency, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Agreement of the predictions for an image and for its view: 1 is the same, 0 is the opposite.

    The paper asks for "invariance of predicted class probabilities under label-preserving augmentations" and gives no formula.

    Parameters
    ----------
    name : Consistency
        The measure.
    log_p : Tensor
        Of the image (..., C).
    log_q : Tensor
        Of its view (..., C).

    Returns
    -------
    Tensor
        (...), in [0, 1].

    References
    ----------
    Ambekar et al., The mean is the mirage, 2026.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.divergence import consistency
    >>> image, view = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.6, 0.4]).log()
    >>> consistency("jsd", image, view), consistency("jsd", image, image)
    (tensor(0.9087), tensor(1.))
    """
    match name:
        case "jsd":
            return 1 - jsd(log_p, log_q) / math.log(2)
        case "tv":
            return 1 - (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
        case "cos":
            return torch.cosine_similarity(log_p.exp(), log_q.exp(), dim=-1)
        case "agree":
            return (log_p.argmax(-1) == log_q.argmax(-1)).to(log_p.dtype)
        case "kl":
            return torch.exp(-kl(log_p, log_q))
