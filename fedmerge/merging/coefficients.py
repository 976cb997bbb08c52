"""A bound on coefficients: no expert may be more than a part of a merge."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coefficients:
    """Weights of the experts, for encoder and head separately.

    encoder, head: (K,) for one merge per batch, or (N, K) for one per sample; rows sum to 1, on the simplex unless the method
    says otherwise. With the bank's A anchors they are (K + A,) or (N, K + A).
    notes: what the method saw on the way (entropies in nats, chosen expert), for the run folder.
    of: what they weigh; with "predictions", the experts' probabilities are mixed by `encoder`, and no model is merged.
    """

    encoder: Tensor
    head: Tensor
    notes: dict[str, list[float]] = field(default_factory=dict)
    of: Literal["weights", "predictions"] = "weights"


SLACK = 1 + 1e-6
"""What rounding may add before it counts as above."""


def capped(alpha: Tensor, most: float) -> Tensor:
    """Coefficients (..., K), not negative, with none above `most` of their sum, and the same sum.

    What is cut off goes to the others in proportion to theirs, or in equal parts if they have nothing, until nobody is above.
    `most` below 1/K counts as 1/K. Worked example: (0.8, 0.15, 0.05), most 0.6: 0.2 is shared 3 to 1, (0.6, 0.3, 0.1).
    """
    K, total = alpha.shape[-1], alpha.sum(-1, keepdim=True)
    bound = max(most, 1 / K) * total
    if bool((alpha <= SLACK * bound).all()):
        return alpha
    full = torch.zeros_like(alpha, dtype=torch.bool)
    found = alpha.clone()
    for _ in range(K):  # at least one more is full after every round
        over = (found > SLACK * bound) & ~full
        if not bool(over.any()):
            break
        full |= over
        left = total - (bound * full).sum(-1, keepdim=True)
        rest = torch.where(full, 0, alpha)
        among = rest.sum(-1, keepdim=True)
        equal = (~full).to(alpha) / (~full).sum(-1, keepdim=True).clamp(min=1)
        share = torch.where(among > 0, rest / torch.where(among > 0, among, 1), equal)
        found = torch.where(full, bound, left * share)
    return found


def cap(found: Coefficients, experts: int, most: float | None) -> Coefficients:
    """The coefficients with both parts capped among the experts; anchors keep theirs."""
    if most is None:
        return found

    def part(alpha: Tensor) -> Tensor:
        return torch.cat([capped(alpha[..., :experts], most), alpha[..., experts:]], -1)

    return replace(found, encoder=part(found.encoder), head=part(found.head))
