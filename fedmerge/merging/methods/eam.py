"""Entropy-adaptive merging: one model for every batch, encoder and head with coefficients of their own.

Ambekar et al., The Mean is the Mirage: Entropy-Adaptive Model Merging, 2026, Eq. 3-9. For each batch B_t of N images:

    Eq. 3   Hbar_k = (1/N) sum_i H_k(x_i)                                    batch entropy, nats
    Eq. 4   alpha_k^enc = (Hbar_k + eps)^-1 / sum_j (Hbar_j + eps)^-1
    Eq. 8   k* = argmax_k S_k                                                low entropy and high consistency A_k
    Eq. 9   alpha_k^head = exp(-gamma |Hbar_k - Hbar_k*|) / sum_j exp(-gamma |Hbar_j - Hbar_k*|)
    Eq. 7   theta_t = (sum_k alpha_k^enc phi_k, sum_k alpha_k^head w_k)
    EMA     abar_t = rho abar_{t-1} + (1 - rho) alpha_t

Where the paper is silent: the values of eps, gamma and rho, the formulas of S and A, the augmentations, and whether the rate
of the moving average multiplies the past or the present (here: the past). The gap of Eq. 9 is symmetric: an expert of lower
entropy than k* loses weight too, as written. The text also speaks of a hard selection of the head, which is gamma = inf.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Adaptive, State
from fedmerge.merging.scoring.divergence import Consistency, consistency
from fedmerge.merging.scoring.views import View
from fedmerge.merging.state import carried_rows, carried_shares

Scorer = Literal["norm_diff", "raw_diff", "product", "ratio", "entropy_only", "rank_sum"]
Variant = Literal["both", "entropy_only", "head_only", "gap_all", "argmin_entropy", "softmax_entropy"]


class Eam(Adaptive):
    """Entropy-adaptive merging with a decoupled head.

    Variants: `both` is the method; `entropy_only` uses Eq. 4 for all parameters and `head_only` a uniform encoder (the paper's
    ablation); `gap_all` uses Eq. 9 for all parameters; `argmin_entropy` takes the surest expert whole; `softmax_entropy` is
    alpha_k ~ exp(-Hbar_k / T), which the paper's appendix D.4 argues against.

    Worked example (K = 2, N = 1): Hbar = (0.1, 0.3) gives alpha^enc = (0.75, 0.25); with k* = 1 and gamma = 10 the gaps are
    (0, 0.2), so alpha^head = (1, e^-2) / (1 + e^-2) = (0.8808, 0.1192).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2, bias=False))
    >>> sure, unsure = ({"1.weight": torch.tensor([[1.0] * 4, [-1.0] * 4]) * scale} for scale in (1.0, 0.1))
    >>> adapt = fedmerge.Adapter(model, {"sure": sure, "unsure": unsure}, "eam", gamma=5)
    >>> adapt(torch.ones(1, 1, 2, 2)).argmax(1)
    tensor([0])
    >>> adapt.coefficients.encoder
    tensor([0.9951, 0.0049], dtype=torch.float64)
    >>> adapt.coefficients.head
    tensor([0.9561, 0.0439], dtype=torch.float64)
    """

    paper: ClassVar[str] = "Ambekar et al., The Mean is the Mirage: Entropy-Adaptive Model Merging, 2026"
    cost: ClassVar[str] = "3K + 1"

    variant: Variant = Field("both", description="the whole method, or one of its ablations")
    eps: float = Field(1e-8, gt=0, le=0.1, description="eps of Eq. 4, added to entropies, in nats")
    gamma: float = Field(
        10.0, ge=0, allow_inf_nan=True, description="sharpness of the head in Eq. 9, per nat; .inf selects one head"
    )
    gap_norm: Literal["none", "lnC"] = Field("none", description="lnC divides the gaps of Eq. 9 by ln C")
    scorer: Scorer = Field("norm_diff", description="S of Eq. 8, the score of an expert")
    consistency: Consistency = Field("jsd", description="A of Eq. 8, the measure of agreement between two views")
    augs: tuple[View, ...] = Field(("flip_or_shift", "contrast"), min_length=1, description="views that are compared for A")
    rho: float = Field(0.5, ge=0, lt=1, description="rho, the weight of the past in the moving average")
    ema: Literal["coef", "entropy", "gap_score", "off"] = Field("coef", description="coefficients that the moving average smooths")
    ema_init: Literal["first", "uniform"] = Field("first", description="past of the first batch: its own coefficients, or 1/K")
    temperature: float = Field(1.0, gt=0, description="T of the variant softmax_entropy, nats")
    calibrated: bool = Field(False, description="whether logits are first divided by each site's temperature")

    def start(self, bank: Bank) -> State:
        """No past, or a uniform one."""
        if self.ema != "coef" or self.ema_init == "first":
            return {}
        uniform = torch.full((bank.K,), 1 / bank.K, dtype=torch.float64)
        return {"encoder": uniform, "head": uniform.clone()}

    def carried(self, state: State, before: tuple[str, ...], bank: Bank) -> State:
        """The averages when experts come and go. The paper has a fixed set; what follows is ours.

        ema: coef. abar is the average of models that have been merged, and a newcomer was in none of them: its past share is 0. A
        leaver's share goes to who stays, in proportion: abar'_k = abar_k / sum_{j stays} abar_j. Under constant alpha a newcomer's
        n-th batch gives it (1 - rho^n) alpha_k. If nobody who had a share stays, the next batch is as the first.
        ema: entropy, gap_score. An entropy or a score of 0 would claim knowledge; a newcomer has none, and its average begins with
        its first batch, as everybody's did at the beginning of the stream. A leaver's is dropped; nothing is to be divided.
        """
        if self.ema == "coef":
            shares = {name: carried_shares(past, before, bank.names) for name, past in state.items()}
            return {name: past for name, past in shares.items() if past is not None}
        nobody = torch.full((bank.K,), torch.nan, dtype=torch.float64)  # what is not finite is no past: see _smooth
        return {name: carried_rows(past, before, bank.names, nobody) for name, past in state.items()}

    def coefficients(self, evidence: Evidence) -> Coefficients:
        """Coefficients for this batch with no past: alpha^enc (K,) and alpha^head (K,) on the simplex."""
        return self.step({}, evidence)[1]

    def step(self, state: State, evidence: Evidence) -> tuple[State, Coefficients]:
        """Coefficients for this batch after the moving average, and the averages as the next state."""
        past, state = state, {}
        Hbar = self._smooth("entropy", evidence.batch_entropies(self.calibrated).double(), past, state)  # Eq. 3
        score = gap = None
        if self._decoupled:
            score = self._smooth("score", self._score(Hbar, evidence), past, state)
            gap = self._smooth("gap", self._gap(Hbar, int(score.argmax()), evidence.classes), past, state)
        encoder, head = self._parts(Hbar, gap)
        encoder = self._smooth("encoder", encoder, past, state, evidence.valid)
        head = self._smooth("head", head, past, state, evidence.valid)
        notes = {"entropies": Hbar.tolist()}
        if score is not None:
            notes |= {"scores": score.tolist(), "chosen": [float(score.argmax())]}
        if not bool(evidence.valid.all()):
            notes["invalid"] = torch.nonzero(~evidence.valid).flatten().tolist()
        return state, Coefficients(encoder, head, notes)

    @property
    def _decoupled(self) -> bool:
        return self.variant in ("both", "head_only", "gap_all")

    def _parts(self, Hbar: Tensor, gap: Tensor | None) -> tuple[Tensor, Tensor]:
        """Coefficients of encoder and head, (K,) each, before the moving average."""
        if self.variant == "argmin_entropy":
            shared = torch.nn.functional.one_hot(Hbar.argmin(), len(Hbar)).double()
        elif self.variant == "softmax_entropy":
            shared = _softmax(-Hbar / self.temperature)
        else:
            shared = inverse_entropy(Hbar, self.eps)
        if gap is None:
            return shared, shared
        head = entropy_gap(gap, self.gamma)
        if self.variant == "gap_all":
            return head, head
        if self.variant == "head_only":
            alive = torch.isfinite(Hbar).double() if bool(torch.isfinite(Hbar).any()) else torch.ones_like(Hbar)
            return alive / alive.sum(), head
        return shared, head

    def _score(self, Hbar: Tensor, evidence: Evidence) -> Tensor:
        """S_k (K,), larger is better; -inf for an expert that is not valid."""
        lnC = math.log(evidence.classes)
        A = self._agreement(evidence)
        H = torch.where(torch.isfinite(Hbar), Hbar, lnC)
        match self.scorer:
            case "entropy_only":
                S = -H
            case "norm_diff":
                S = A - H / lnC
            case "raw_diff":
                S = A - H
            case "product":
                S = A * torch.exp(-H)
            case "ratio":
                S = A / (H + self.eps)
            case "rank_sum":
                S = _ranks(A) + _ranks(-H)
        return torch.where(torch.isfinite(Hbar), S, -torch.inf)

    def _agreement(self, evidence: Evidence) -> Tensor:
        """A_k (K,) in [0, 1]: mean consistency over the views and the batch; not asked for when S does not use it."""
        if self.scorer == "entropy_only":
            return torch.zeros(evidence.bank.K, dtype=torch.float64)
        log_p = evidence.log_p(calibrated=self.calibrated)
        views = [evidence.log_p(view, self.calibrated) for view in self.augs]
        A = torch.stack([consistency(self.consistency, log_p, view).mean(1) for view in views]).mean(0).double().cpu()
        return A.nan_to_num(0.0)  # logits that are finite on the images alone are not of one mind with the view's

    def _gap(self, Hbar: Tensor, chosen: int, classes: int) -> Tensor:
        """|Hbar_k - Hbar_k*| (K,), infinite for an expert that is not valid, and 0 for all if none is."""
        if not bool(torch.isfinite(Hbar).any()):
            return torch.zeros_like(Hbar)
        return (Hbar - Hbar[chosen]).abs() / (math.log(classes) if self.gap_norm == "lnC" else 1.0)

    def _smooth(self, name: str, value: Tensor, past: State, state: State, valid: Tensor | None = None) -> Tensor:
        """The moving average of one quantity, if it is the one that `ema` names: rho past + (1 - rho) present.

        valid: (K,), for coefficients: an expert that is not valid has none, as one who leaves; what it had, the others share.
        """
        value = value.cpu()
        if name not in SMOOTHED[self.ema] or self.rho == 0:
            return value
        if name in past:
            both = torch.isfinite(past[name]) & torch.isfinite(value)
            value = torch.where(both, self.rho * past[name] + (1 - self.rho) * value, value)
            if valid is not None and bool(valid.any()):
                value = torch.where(valid.cpu(), value, 0)
            value = value / value.sum() if self.ema == "coef" else value
        state[name] = value
        return value


SMOOTHED = {"coef": ("encoder", "head"), "entropy": ("entropy",), "gap_score": ("score", "gap"), "off": ()}


def inverse_entropy(Hbar: Tensor, eps: float) -> Tensor:
    """Eq. 4: alpha_k = (Hbar_k + eps)^-1 / sum_j (Hbar_j + eps)^-1.

    Parameters
    ----------
    Hbar : Tensor
        Mean entropies (K,), nats; infinite ones get 0.
    eps : float
        Greater than 0, nats.

    Returns
    -------
    Tensor
        alpha (K,), on the simplex.

    References
    ----------
    Ambekar et al., The mean is the mirage, 2026, equation 4.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.eam import inverse_entropy
    >>> inverse_entropy(torch.tensor([0.1, 0.3]), eps=1e-8)
    tensor([0.7500, 0.2500])
    """
    if not bool(torch.isfinite(Hbar).any()):
        return torch.full_like(Hbar, 1 / len(Hbar))
    inverse = 1 / (Hbar + eps)
    return inverse / inverse.sum()


def entropy_gap(gap: Tensor, gamma: float) -> Tensor:
    """Eq. 9: alpha_k = exp(-gamma gap_k) / sum_j exp(-gamma gap_j).

    Parameters
    ----------
    gap : Tensor
        How far each expert's entropy is from that of expert k*, (K,), nats.
    gamma : float
        Sharpness, 0 or more; infinity shares among the zeros.

    Returns
    -------
    Tensor
        alpha (K,), on the simplex.

    References
    ----------
    Ambekar et al., The mean is the mirage, 2026, equation 9.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.eam import entropy_gap
    >>> entropy_gap(torch.tensor([0.0, 0.2]), gamma=10)
    tensor([0.8808, 0.1192])
    """
    if math.isinf(gamma):
        nearest = (gap == gap.min()).double()
        return nearest / nearest.sum()
    return _softmax(torch.where(torch.isfinite(gap), -gamma * gap, -torch.inf))


def _softmax(scores: Tensor) -> Tensor:
    return torch.full_like(scores, 1 / len(scores)) if bool(torch.isinf(scores).all()) else scores.softmax(0)


def _ranks(values: Tensor) -> Tensor:
    """Number of experts that are strictly worse, (K,)."""
    return (values[:, None] > values[None, :]).double().sum(1)
