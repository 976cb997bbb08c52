"""Test-time merging by disagreement: how far generalist and expert differ on an image decides how much of the expert is taken."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Adaptive
from fedmerge.merging.scoring.divergence import confidence, entropy, jsd, kl

LN2 = math.log(2)


class T3(Adaptive):
    """One merge for every image, of a generalist g and experts k:

        Eq. 5/9   I_k = KL(p_g || pbar)/2 + KL(p_k || pbar)/2, pbar = (p_g + p_k)/2        mutual information, [0, ln 2] nats
        Eq. 10    lambda_k = l_min + (l_max - l_min) sigma(I_k)
        Eq. 11    lambda'_k = min(lambda_k + delta, 1) if H_k < tau_f;  max(lambda_k - delta, 0) if H_g < tau_g;  else lambda_k
        Eq. 8     theta = (1 - lambda') theta_g + lambda' theta_k                          one expert, as in the paper

    K experts are ours: `pairwise_mean` is the mean of K such merges, alpha_k = lambda'_k / K, so K = 1 is the paper's; `joint`
    takes one divergence of all K + 1 models and splits lambda by exp(-H_k); `no_generalist` is alpha_k ~ exp(-KL(p_k || pbar)).
    Where the source contradicts itself: sigma of [0, ln 2] is [0.50, 0.67], so that lambda as printed (`literal`) never nears 0
    or 1 as its text says; `rescaled` maps I / ln 2 linearly, `scaled_sigmoid` is sigma(kappa (I / ln 2 - 1/2)). Its zero-shot
    generalist is theta_0 of a CLIP (`generalist: theta_0`); models of timm have none: g is the experts' mean, or the scenario's.
    Worked example: p_g = (1, 0), p_1 = (0, 1): I = ln 2, lambda = 2/3; H_1 = 0 < tau_f, so lambda' = min(2/3 + 1/2, 1) = 1.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> sure, unsure = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.1, 0.2]))
    >>> start = {"weight": torch.zeros(2, 1)}
    >>> adapt = fedmerge.Adapter(model, [sure], "t3", base=start, generalist="theta_0")
    >>> adapt(torch.tensor([[3.0], [0.1]])).argmax(1)
    tensor([0, 0])
    >>> adapt.coefficients.encoder  # of the expert, and of theta_0
    tensor([[1.0000, 0.0000],
            [0.5012, 0.4988]], dtype=torch.float64)
    """

    paper: ClassVar[str] = "Imam et al., T^3: Test-time model merging in VLMs, 2025"
    cost: ClassVar[str] = "2K + 1"

    map: Literal["literal", "rescaled", "scaled_sigmoid"] = Field("literal", description="how lambda follows from I (Eq. 10)")
    kappa: float = Field(10.0, gt=0, description="slope of scaled_sigmoid")
    l_min: float = Field(0.0, ge=0, le=1, description="lambda's lower end")
    l_max: float = Field(1.0, ge=0, le=1, description="lambda's upper end")
    delta: float = Field(0.5, ge=0, le=1, description="extrapolation if one model is sure (Eq. 11)")
    tau_f: float = Field(0.05, ge=0, description="entropy below which an expert is sure, nats")
    tau_g: float = Field(0.05, ge=0, description="entropy below which the generalist is sure, nats")
    k_rule: Literal["pairwise_mean", "joint", "no_generalist"] = Field("pairwise_mean", description="rule for K experts")
    generalist: Literal["mean", "theta_0", "generalist"] = Field(
        "mean", description="g; generalist: the model that the scenario names by this key"
    )
    signal: Literal["mutual_information", "confidence_ratio", "entropy_ratio", "one_minus_entropy_ratio"] = Field(
        "mutual_information",
        description="quantity from which lambda is computed before Eq. 11; the ratios are the paper's ablation",
    )
    precompute: bool = Field(False, description="whether coefficients come from a first pass over all images, as in appendix D.3")

    @property
    def needed(self) -> frozenset[str]:
        """The anchor that serves as generalist."""
        return frozenset() if self.generalist == "mean" or self.k_rule == "no_generalist" else frozenset({self.generalist})

    @property
    def remark(self) -> str:
        """Which generalist, and whether the first pass counts."""
        who = {"mean": "the experts' mean", "theta_0": "theta_0", "generalist": "the scenario's model"}[self.generalist]
        said = "no generalist" if self.k_rule == "no_generalist" else f"generalist: {who}; zero-shot only if it is a CLIP's theta_0"
        return f"{said}; precomputed: not online, and its first pass is counted" if self.precompute else said

    @property
    def precomputes(self) -> bool:
        """As asked for."""
        return self.precompute

    def coefficients(self, evidence: Evidence) -> Coefficients:
        """alpha (N, K), or (N, K + A) where the generalist is an anchor; rows on the simplex."""
        alpha = self.rows(evidence)
        return Coefficients(alpha, alpha, _events(evidence))

    def rows(self, evidence: Evidence) -> Tensor:
        """alpha' of every image, Eq. 8-11."""
        log_p = evidence.log_p()  # (K, N, C)
        valid = evidence.valid if bool(evidence.valid.any()) else torch.ones_like(evidence.valid)
        if self.k_rule == "no_generalist":
            log_p = torch.where(valid[:, None, None], log_p, -math.log(evidence.classes))
            pbar = log_p[valid].logsumexp(0) - math.log(int(valid.sum()))
            weight = torch.where(valid[:, None], torch.exp(-kl(log_p, pbar.expand_as(log_p))), 0)
            return (weight / weight.sum(0)).T.double()
        log_g = evidence.anchor_log_p(self.generalist)  # (N, C)
        log_p = torch.where(valid[:, None, None], log_p, log_g)
        H_g, H = entropy(log_g), entropy(log_p)
        if self.k_rule == "joint":
            own, models = log_p[valid], int(valid.sum()) + 1
            together = torch.cat([log_g[None], own]).logsumexp(0) - math.log(models)
            I = (entropy(together) - (H_g + H[valid].sum(0)) / models).clamp(min=0)  # noqa: E741 - the paper's symbol
            total = self._sharpened(self._ratio(I * LN2 / math.log(models), log_g, own), H[valid].amin(0), H_g)
            share = torch.where(valid[:, None], torch.exp(-H), 0)
            alpha = total * share / share.sum(0)
        else:
            alpha = self._sharpened(self._ratio(jsd(log_g.expand_as(log_p), log_p), log_g, log_p), H, H_g)
            alpha = torch.where(valid[:, None], alpha, 0) / valid.sum()
        return self._with_generalist(alpha.T.double(), valid, evidence)

    def _ratio(self, I: Tensor, log_g: Tensor, log_p: Tensor) -> Tensor:  # noqa: E741 - the paper's symbol
        """lambda of Eq. 10, or of the paper's ablation (its table 9). I: (N,) jointly, or (K, N)."""
        if self.signal == "mutual_information":
            if self.map == "literal":
                level = torch.sigmoid(I)
            elif self.map == "rescaled":
                level = I / LN2
            else:
                level = torch.sigmoid(self.kappa * (I / LN2 - 0.5))
            return self.l_min + (self.l_max - self.l_min) * level
        if self.signal == "confidence_ratio":
            f, g = confidence(log_p), confidence(log_g)
        else:
            f, g = entropy(log_p), entropy(log_g)
        if I.ndim == 1:  # jointly: the experts as one
            f = f.mean(0)
        R = torch.where(f + g > 0, f / (f + g).clamp(min=torch.finfo(f.dtype).tiny), 0.5)
        return 1 - R if self.signal == "one_minus_entropy_ratio" else R

    def _sharpened(self, level: Tensor, H: Tensor, H_g: Tensor) -> Tensor:
        """Eq. 11; where both are sure, the expert's branch comes first."""
        down = torch.where(torch.lt(H_g, self.tau_g), (level - self.delta).clamp(min=0), level)
        sure = torch.lt(H, self.tau_f)
        return torch.where(sure, (level + self.delta).clamp(max=1), down)

    def _with_generalist(self, alpha: Tensor, valid: Tensor, evidence: Evidence) -> Tensor:
        """Rows (N, K) of experts; what is left is the generalist's: its own column, or shared by those it is the mean of."""
        rest = 1 - alpha.sum(1, keepdim=True)
        if self.generalist == "mean":
            return alpha + rest * valid.double() / valid.sum()
        bank = evidence.bank
        whole = alpha.new_zeros(len(alpha), bank.K + bank.A)
        whole[:, : bank.K] = alpha
        whole[:, bank.anchor(self.generalist)] = rest[:, 0]
        return whole


def _events(evidence: Evidence) -> dict[str, list[float]]:
    """Experts whose logits were not finite, for the run folder."""
    broken = torch.nonzero(~evidence.valid).flatten().tolist()
    return {"invalid": broken} if broken else {}
