"""The temperature that a site fits on its own validation images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from fedmerge.federated.security.audit import HIGHEST, LOWEST


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """argmin_T of the mean negative log-likelihood of softmax(z / T), T in [0.05, 20] (Guo et al., ICML 2017).

    logits: (N, C); y: (N,). Bounded golden-section search over log T, in float64. The likelihood is convex in 1 / T.
    """
    z = logits.double()

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(z / math.exp(log_t), y))

    found = minimize_scalar(loss, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded", options={"xatol": 1e-6})
    return float(torch.tensor(math.exp(found.x)).clamp(LOWEST, HIGHEST))
