"""The mean of the experts, drawn towards the initialization by the angle between them."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes, block, inner_products, tensorwise
from fedmerge.merging.bank.row_storage import weighted_sum
from fedmerge.merging.methods._base import Static


class ModelStock(Static):
    """theta = t mean(theta_k) + (1 - t) theta_0, t = K cos / (1 + (K - 1) cos), for every tensor of the model by itself.

    cos is the cosine of two experts' task vectors. For K > 2 the paper's figure is one angle; mergekit averages the cosines of
    pairs (`cosine`, the default here), FusionBench their angles (`angle`). A negative average counts as 0, because t has a pole at
    -1/(K - 1); single pairs may be negative, so that unrelated task vectors average to about 0. A tensor's K x K inner products
    are all that t needs. Worked example: K = 2, cos = 0.5: t = 2/3; cos = 1 gives the mean, cos = 0 gives theta_0.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start, a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [1.0, 0.0], [0.5, 0.75 ** 0.5]))
    >>> fedmerge.merge(model, [a, b], "model_stock", base=start)["weight"]
    tensor([[0.5000, 0.2887]])
    """

    paper: ClassVar[str] = "Jang et al., Model stock, ECCV 2024"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    average: Literal["cosine", "angle"] = Field("cosine", description="quantity that is averaged over pairs of experts")
    filter_wise: bool = Field(
        False, description="whether every row of a matrix (output, filter) has its own t, instead of one t for the tensor"
    )

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        theta_0 = bank.anchor_row("theta_0")

        def one(name: str, theta: Tensor, out: Tensor) -> None:
            rows = bank.shapes[name][0] if self.filter_wise and len(bank.shapes[name]) > 1 else 1
            theta, start = theta.view(bank.K, rows, -1), theta_0[bank.slices[name]].to(theta).view(rows, -1)
            if bank.K > MANY and self.average == "cosine":
                t = mean_ratio(mean_cosine(theta, start), bank.K)[:, None]
            else:
                t = self._ratio(inner_products(theta, start))[:, None]
            if rows == 1:
                weights = torch.cat([(t[0] / bank.K).expand(bank.K), 1 - t[0]])
                weighted_sum([*theta[:, 0], start[0]], weights, out)
                return
            found, step = out.view(rows, -1), block(theta, bank.K)
            for at in (slice(first, first + step) for first in range(0, start.shape[1], step)):
                torch.lerp(start[:, at], theta[:, :, at].mean(0), t.to(theta), out=found[:, at])

        return tensorwise(bank, one)

    def working_bytes(self, sizes: Sizes) -> int:
        """One tensor of all experts, where they are on a disk or in shards."""
        return 4 * sizes.experts * sizes.largest

    def _ratio(self, G: Tensor) -> Tensor:
        """t (R,) for inner products of task vectors (R, K, K)."""
        K = G.shape[-1]
        if K == 1:
            return G.new_ones(len(G))
        i, j = torch.triu_indices(K, K, 1)
        own = G.diagonal(dim1=1, dim2=2)
        product, lengths = G[:, i, j], (own[:, i] * own[:, j]).sqrt()
        same = (own[:, i] == own[:, j]) & (product == own[:, i])  # also where both are 0
        cosines = torch.where(same, 1.0, product / lengths.clamp(min=torch.finfo(G.dtype).tiny)).clamp(-1, 1)
        cos = (cosines.mean(1) if self.average == "cosine" else cosines.acos().mean(1).cos()).clamp(0, 1)
        return mean_ratio(cos, K)


def mean_ratio(cos: Tensor, K: int) -> Tensor:
    """How far Model Stock goes from the start to the mean: t = K cos / (1 + (K - 1) cos).

    Parameters
    ----------
    cos : Tensor
        Average cosines (R,), in [0, 1].
    K : int
        Models.

    Returns
    -------
    Tensor
        t (R,), in [0, 1].

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.model_stock import mean_ratio
    >>> mean_ratio(torch.tensor([0.0, 0.5, 1.0]), K=2)
    tensor([0.0000, 0.6667, 1.0000])
    """
    return K * cos / (1 + (K - 1) * cos)


def mean_cosine(theta: Tensor, start: Tensor) -> Tensor:
    """The mean over pairs of cos(theta_i - start, theta_j - start), without a look at any pair.

    From the sum u of task vectors of length 1 it is (u . u - K) / (K (K - 1)). Vectors of length 0 are alike, and at right angles
    to all others.

    Parameters
    ----------
    theta : Tensor
        (K, R, d).
    start : Tensor
        (R, d).

    Returns
    -------
    Tensor
        (R,), at least 0.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.model_stock import mean_cosine
    >>> theta = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])
    >>> mean_cosine(theta, start=torch.zeros(1, 2))
    tensor([0.7071], dtype=torch.float64)
    """
    K = len(theta)
    total = torch.zeros(start.shape, dtype=torch.float64, device=start.device)
    zeros = torch.zeros(len(start), dtype=torch.float64, device=start.device)
    for one in theta:
        tau = one.double() - start
        length = torch.linalg.vector_norm(tau, dim=1, keepdim=True)
        zeros += (length[:, 0] == 0).double()
        total += tau / torch.where(length > 0, length, 1)
    pairs = (total**2).sum(1) - (K - zeros) + zeros * (zeros - 1)
    return (pairs / (K * (K - 1))).clamp(0, 1)


MANY = 64
"""Experts above which pairs of them are not looked at one by one: what that takes grows with their number squared."""
