"""The diagonal of a classifier's Fisher information: how much the prediction depends on every single parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Estimator = Literal["exact", "mc", "fb_compat"]
Forward = Callable[[Tensor, Tensor], Tensor]
"""(theta (P,), x (N, channels, H, W)) -> logits (N, C)."""

GRADIENT_BYTES = 2**28
"""Memory for the gradients of the samples that are looked at together."""

VALUES = 2**23
"""Numbers of images that are looked at together."""

BATCH = 32
"""Samples whose gradients `fb_compat` sums before squaring."""


class Batched(Protocol):
    """Images (N, channels, H, W): a tensor, or what makes batches of them as they are asked for, on the model's device."""

    @property
    def shape(self) -> Any:
        """As of a tensor."""

    def __len__(self) -> int: ...

    def split(self, split_size: int, /) -> Iterable[Tensor]:
        """Batches of so many."""


def diagonal(forward: Forward, theta: Tensor, x: Batched, estimator: Estimator = "exact", seed: int = 0) -> Tensor:
    """Diagonal of the Fisher information under the model's own label distribution.

    exact:      F = (1/N) sum_i sum_c p_ic (d log p_ic / d theta)^2
    mc:         F = (1/N) sum_i (d log p_iy / d theta)^2, one label y ~ p_i for each sample
    fb_compat:  F = (1/N) sum_batches (d/d theta sum_i sum_c sqrt(p_ic) log p_ic)^2, as FusionBench has it: it squares a sum over
                samples and classes, so it depends on the batch size and is not the diagonal; for comparison only.

    Parameters
    ----------
    forward : Forward
        Takes theta (P,) and images, and returns logits (N, C).
    theta : Tensor
        Parameters (P,).
    x : Batched
        Images (N, channels, H, W).
    estimator : Estimator, default 'exact'
        One of the three above.
    seed : int, default 0
        Of the labels that `mc` draws.

    Returns
    -------
    Tensor
        F (P,), not negative, at least float32: sums of many squares need its digits.

    References
    ----------
    Matena & Raffel, Merging models with Fisher-weighted averaging, NeurIPS 2022, equation 2.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.curvature.fisher import diagonal
    >>> def forward(theta, x):
    ...     return x @ theta.reshape(1, 2)
    >>> diagonal(forward, torch.zeros(2), torch.tensor([[1.0], [2.0]]))  # mean of x^2 / 4
    tensor([0.6250, 0.6250])
    """
    if estimator == "fb_compat":
        return _squares_of_sums(forward, theta, x)
    generator = torch.Generator().manual_seed(seed)
    total = _room(theta)
    size = max(1, min(GRADIENT_BYTES // (theta.numel() * theta.element_size()), VALUES // prod(x.shape[1:])))
    for part in x.split(size):
        p = forward(theta, part).detach().softmax(-1)
        if estimator == "mc":
            labels = torch.multinomial(p.cpu(), 1, generator=generator).to(part.device)
            total += (_gradients(forward, theta, part, labels[:, 0]).to(total) ** 2).sum(0)
        else:
            for c in range(p.shape[1]):
                g = _gradients(forward, theta, part, torch.full((len(part),), c, device=part.device))
                total += p[:, c].to(total) @ g.to(total) ** 2
    return total / len(x)


def _room(theta: Tensor) -> Tensor:
    return torch.zeros_like(theta, dtype=theta.dtype if theta.dtype == torch.float64 else torch.float32)


def _gradients(forward: Forward, theta: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """d log p_iy / d theta (N, P) of every sample by itself."""

    def log_p(theta: Tensor, image: Tensor, label: Tensor) -> Tensor:
        return forward(theta, image[None]).log_softmax(-1)[0].gather(0, label[None])[0]

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no rule for vmap, and would go one by one
        per_sample: Tensor = vmap(grad(log_p), in_dims=(None, 0, 0))(theta, x, labels)
    return per_sample


@torch.enable_grad()
def _squares_of_sums(forward: Forward, theta: Tensor, x: Batched) -> Tensor:
    total = _room(theta)
    for part in x.split(BATCH):
        leaf = theta.detach().requires_grad_()
        log_p = forward(leaf, part).log_softmax(-1)
        weighted = (log_p.detach().exp().sqrt() * log_p).sum()
        total += torch.autograd.grad(weighted, leaf)[0].to(total) ** 2
    return total / len(x)
