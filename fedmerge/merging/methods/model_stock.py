"""The mean of the experts, drawn towards the initialization by the angle between them."""

from __future__ import annotations

from itertools import combinations
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes, tensorwise
from fedmerge.merging.methods._base import Static


class ModelStock(Static):
    """theta = t mean(theta_k) + (1 - t) theta_0, t = K cos / (1 + (K - 1) cos), for every tensor of the model by itself.

    cos is the cosine of two experts' task vectors, in [0, 1]: negative ones count as 0, because t has a pole at -1/(K - 1).
    For K > 2 the paper's figure is one angle; mergekit averages the cosines of pairs (`cosine`, the default here), FusionBench
    their angles (`angle`). Worked example: K = 2, cos = 0.5: t = 2/3; cos = 1 gives the mean, cos = 0 gives theta_0.
    """

    paper: ClassVar[str] = "Jang et al., Model stock, ECCV 2024"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    average: Literal["cosine", "angle"] = Field("cosine", description="what is averaged over pairs of experts")
    filter_wise: bool = Field(False, description="one t for every row of a matrix (output, filter), not one for the tensor")

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""

        def one(name: str, tau: Tensor) -> Tensor:
            rows = bank.shapes[name][0] if self.filter_wise and len(bank.shapes[name]) > 1 else 1
            pulled = tau.reshape(bank.K, rows, -1)
            t = self._ratio(pulled)  # (rows,)
            return (t[:, None] * pulled.mean(0)).reshape(-1)

        return bank.anchor_row("theta_0") + tensorwise(bank, bank.taus, one)

    def working_bytes(self, sizes: Sizes) -> int:
        """One tensor's task vectors of all experts."""
        return 4 * 4 * sizes.experts * sizes.largest

    def _ratio(self, tau: Tensor) -> Tensor:
        """t (rows,) for task vectors (K, rows, d)."""
        K = len(tau)
        if K == 1:
            return torch.ones(tau.shape[1], dtype=tau.dtype, device=tau.device)
        cosines = torch.stack([_cosine(tau[i], tau[j]) for i, j in combinations(range(K), 2)]).clamp(0, 1)
        cos = cosines.mean(0) if self.average == "cosine" else cosines.acos().mean(0).cos()
        return K * cos / (1 + (K - 1) * cos)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of rows (rows, d); 1 where both are the same, also where both are 0."""
    return torch.where((a == b).all(-1), 1.0, F.cosine_similarity(a, b, dim=-1))
