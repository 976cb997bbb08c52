"""A mixture of the experts whose training images lie near the image, or batch, in the embedding of theta_0's encoder."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedmerge.errors import CheckpointError
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Adaptive, State
from fedmerge.merging.scoring.features import center


class Ttmm(Adaptive):
    """theta = sum_k w_k theta_k, w a sparse softmax of similarities (Bertolissi et al., 2025, section 3.2).

    v = softmax_k(phi . phi_k / beta); w_k = v_k / sum_j v_j over those with v_k > tau, the `most` largest at most; else 0.
    phi_k: each site's centroid, of length 1. phi: the image's embedding of length 1, or the batch's centroid. Where no v_k is
    above tau, the model is theta_0, as in the authors' code; where sites started from heads of their own, the nearest expert. beta
    and tau are those of the code, whose kernel exp(-(1 - phi . phi_k) / 0.2^2) is the same softmax.
    Worked example: similarities (1, 0.96, 0.8), beta 0.04: v = (0.728, 0.268, 0.005), w = (0.731, 0.269, 0).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(2, 2, bias=False))
    >>> start, a, b = ({"1.weight": torch.eye(2) * scale} for scale in (1.0, 2.0, 3.0))
    >>> centroids = [{"centroid": torch.tensor(phi)} for phi in ([1.0, 0.0], [0.0, 1.0])]
    >>> adapt = fedmerge.Adapter(model, [a, b], "ttmm", base=start, statistics={"centroid": centroids})
    >>> adapt(torch.tensor([[5.0, 0.1], [1.0, 1.05]])).argmax(1)
    tensor([0, 1])
    >>> adapt.coefficients.encoder  # the second image lies between the two sites
    tensor([[1.0000, 0.0000],
            [0.2969, 0.7031]], dtype=torch.float64)
    """

    paper: ClassVar[str] = "Bertolissi et al., Local mixtures of experts (TTMM), COLM 2025"
    cost: ClassVar[str] = "K + 1"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0", "centroid"})
    exceptions: ClassVar[dict[str, str]] = {
        "cost": "experts that are not near an image of the batch are not forwarded",
        "broken": "experts are chosen by where their images lie, before anybody knows what they say",
    }

    granularity: Literal["image", "batch"] = Field("image", description="one merge for each image, or one for the batch")
    beta: float = Field(0.04, gt=0, description="beta, the temperature of similarities")
    tau: float = Field(0.01, ge=0, lt=1, description="tau, the coefficient below which an expert gets 0")
    most: int = Field(50, ge=1, description="largest number of experts in a merge")

    def start(self, bank: Bank) -> State:
        """No past. Raises CheckpointError if there is no centroid of every site, or no theta_0."""
        bank.statistics.vectors("centroid", self.key)
        bank.anchor("theta_0")
        return {}

    def coefficients(self, evidence: Evidence) -> Coefficients:
        """(N, K) or (K,); (N, K + A) or (K + A,) where theta_0 has a part."""
        bank = evidence.bank
        phi, f = bank.statistics.vectors("centroid", self.key).double(), evidence.embedding().double()
        if f.shape[1] != phi.shape[1]:
            found = f"found centroids of {phi.shape[1]} numbers"
            raise CheckpointError(f"{self.key}: {found}; expected {f.shape[1]}, as theta_0's encoder gives its head")
        fine = torch.isfinite(f).all(1)
        f = f[fine] if bool(fine.any()) else torch.zeros_like(f[:1])
        near = center(f)[None] if self.granularity == "batch" else F.normalize(f, dim=1)
        w = near @ F.normalize(phi, dim=1).T.to(near)
        w = self._sparse(w, bank).cpu()
        if self.granularity == "batch":
            return Coefficients(w[0], w[0])
        whole = torch.full((len(fine), w.shape[1]), 1 / bank.K, dtype=w.dtype)  # of an image that theta_0 cannot see
        whole[:, bank.K :] = 0
        if bool(fine.any()):
            whole[fine.cpu()] = w
        return Coefficients(whole, whole)

    def _sparse(self, similarity: Tensor, bank: Bank) -> Tensor:
        """w (N, K), or (N, K + A) where an image has no expert."""
        v = (similarity / self.beta).softmax(1)
        least = v.topk(min(self.most, bank.K), dim=1).values[:, -1:]
        v = torch.where((v > self.tau) & (v >= least), v, 0)
        total = v.sum(1, keepdim=True)
        nobody = total[:, 0] == 0
        w = v / torch.where(total > 0, total, 1)
        if not bool(nobody.any()):
            return w
        if not bank.shared_head:
            return torch.where(nobody[:, None], F.one_hot(similarity.argmax(1), bank.K).to(w), w)
        rest = w.new_zeros(len(w), bank.A)
        rest[:, bank.anchors.index("theta_0")] = nobody.to(w)
        return torch.cat([w, rest], 1)
