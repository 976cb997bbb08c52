"""How much an expert's prediction of an image agrees with that of an augmented view: 1 is the same, 0 is the opposite.

The paper (Ambekar et al. 2026) asks for "invariance of predicted class probabilities under label-preserving augmentations"
and gives no formula. All of these are in [0, 1].
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fedmerge.merge.entropy import jsd, kl

Consistency = Literal["jsd", "tv", "cos", "agree", "kl"]


def consistency(name: Consistency, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Agreement (...) of predictions log p and log q (..., C) of an image and its view."""
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
