"""A model for every image, or every batch, from the posterior of the site that it resembles.

The story: each image of a batch comes from a site k, drawn with shares pi that drift from batch to batch, and has a label y, drawn
with shares b of this batch. Nobody tells k; what tells of it is how the site's expert speaks about the image. An expert that knows
such images is sure of them, and right; being right cannot be seen, but agreeing with models that fail in other ways can:

    q(c | x)  = mean of the predictions of a panel of models             consensus
    s_ik      = -H(p_k(. | x_i)) + sum_c p_k(c | x_i) log q(c | x_i)     evidence: sure, and of one mind with the consensus
    p(k, y | x_i) proportional to pi_k exp(beta s_ik) p_k(y | x_i) b_y   EM over the batch: r_ik, pi, b
    theta(x_i) = t sum_k r_ik theta_k + (1 - t) theta_0                  one model for the image, or with pi one for the batch

t is 1/2 while the mean that is drawn half-way to theta_0 agrees more with the others of the panel, over the stream so far, than the
mean itself, and 1 otherwise: experts of one site each have gone further than a hospital that resembles several of them wants.
b is learned with `label_prior: batch` alone, and even otherwise.

What an assumption costs when it is wrong. Sites that are alike: all s_ik are alike, r is even, and the merge is the mean's.
Evidence fooled by a sure expert (a head scaled up): the consensus disagrees, and its cross entropy grows with its sureness. A crowd
of bad experts: the panel's models that are drawn towards theta_0 disagree with them. Batches without shared sites: pi is even, and
each image's evidence decides alone. Label shares that are even: they do not pay for their parameters, and stay even. Experts that
are all bad: their evidence is alike, r is even, and the merge is the mean merge, which is of the panel; the notes have the shares,
and how far the evidence of the best is above the mean of all.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes
from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Adaptive, State
from fedmerge.merging.methods.model_stock import ModelStock
from fedmerge.merging.methods.wise_ft import WiseFt
from fedmerge.merging.scoring.divergence import entropy
from fedmerge.merging.scoring.latent import explain
from fedmerge.merging.state import carried_rows

Member = Literal["ensemble", "mean", "wise_ft", "model_stock"]
ABOUT_THETA_0 = {"wise_ft": WiseFt(), "model_stock": ModelStock()}


class Posterior(Adaptive):
    """theta_i = sum_k r_ik theta_k, r_ik the posterior of image i's site, by EM over sites and labels of the batch.

    Without theta_0 the panel is the ensemble and the mean. Worked example (K = 2, C = 2, one image, even shares, beta 1):
    q = (0.7, 0.3), p_1 = (0.9, 0.1), p_2 = (0.5, 0.5) give s = (-0.766, -1.473), and r = (0.670, 0.330).
    """

    paper: ClassVar[str] = "fedmerge, this project, 2026"
    cost: ClassVar[str] = "2K + 4"
    exceptions: ClassVar[dict[str, str]] = {"cost": "one forward less while the merge is not drawn towards theta_0"}

    granularity: Literal["image", "batch"] = Field("image", description="one merge for each image, or one for the batch")
    panel: tuple[Member, ...] = Field(
        ("ensemble", "mean", "wise_ft", "model_stock"), min_length=1, description="models whose mean prediction is the consensus"
    )
    evidence: Literal["cross", "agreement"] = Field("cross", description="s_ik as above, or log sum_c p_k(c | x_i) q(c | x_i)")
    beta: float = Field(1.0, ge=0, description="sharpness of the evidence, per nat")
    head_beta: float | None = Field(None, ge=0, description="that of the head; default beta")
    em: bool = Field(True, description="learn the sites' shares from the batch; false: from the past alone")
    shrink: Literal["none", "half", "agreed"] = Field(
        "agreed",
        description="half: drawn half-way to theta_0; agreed: if the panel agrees more with the mean so drawn",
    )
    rho: float = Field(0.5, ge=0, lt=1, description="weight of the past in the sites' shares")

    def start(self, bank: Bank) -> State:
        """Even shares, and nothing known of shrinking."""
        return {"pi": torch.full((bank.K,), 1 / bank.K, dtype=torch.float64), "ahead": torch.zeros(1, dtype=torch.float64)}

    def carried(self, state: State, before: tuple[str, ...], bank: Bank) -> State:
        """Who stays keeps its share, and who is new has an even one; with the next batch all sum to 1 again."""
        return {**state, "pi": carried_rows(state["pi"], before, bank.names, self.start(bank)["pi"])}

    def working_bytes(self, sizes: Sizes) -> int:
        """The panel's merged models."""
        return 4 * sizes.parameters * sum(member in ABOUT_THETA_0 for member in self.panel)

    def coefficients(self, evidence: Evidence) -> Coefficients:
        """For this batch alone: (N, K), or (K,) with granularity batch."""
        return self.step(self.start(evidence.bank), evidence)[1]

    def step(self, state: State, evidence: Evidence) -> tuple[State, Coefficients]:
        """Posteriors given the past, and the shares that the batch leaves."""
        members = self._members(evidence.bank)
        said = {member: _said(evidence, member) for member in members}
        log_p, log_q = evidence.log_p(), _consensus([*said.values()])
        s = torch.where(evidence.valid[:, None], _scores(self.evidence, log_p, log_q), -torch.inf).double().cpu().T  # (N, K)
        notes = {"panel": [float(member in members) for member in ("ensemble", "mean", "wise_ft", "model_stock")]}
        if not bool(evidence.valid.any()):
            even = self.start(evidence.bank)["pi"]
            return state, self._given(even.expand_as(s), even.expand_as(s), even, notes)
        ahead = state["ahead"] + _ahead(said, log_q)
        wanted = self.shrink == "half" or (self.shrink == "agreed" and bool(ahead > 0))
        t = 0.5 if wanted and "theta_0" in evidence.bank.anchors and evidence.bank.shared_head else 1.0
        past = state["pi"] / state["pi"].sum()
        found = explain(self.beta * s, log_p, past, label_shares=self.label_prior == "batch")
        pi = self.rho * past + (1 - self.rho) * found.sites if self.em else past
        known = (log_p.double().cpu().exp().nan_to_num() @ found.labels * evidence.classes).clamp(min=1e-300).log().T  # (N, K)
        betas = (self.beta, self.beta if self.head_beta is None else self.head_beta)
        r, head = ((pi.log() + known + beta * s).softmax(1) for beta in betas)
        evidences = s.mean(0)[evidence.valid.cpu()]
        notes |= {"shares": pi.tolist(), "label_gain": [found.gain], "ahead": [float(evidences.max() - evidences.mean())]}
        kept = pi if self.em else self.rho * pi + (1 - self.rho) * r.mean(0)
        notes["towards_theta_0"] = [1 - t]
        r, head, pi = (_drawn(x, t, evidence.bank) for x in (r, head, pi))
        return {"pi": kept, "ahead": ahead}, self._given(r, head, pi, notes)

    def _members(self, bank: Bank) -> tuple[Member, ...]:
        return tuple(member for member in self.panel if member not in ABOUT_THETA_0 or "theta_0" in bank.anchors) or ("mean",)

    def _given(self, r: Tensor, head: Tensor, pi: Tensor, notes: dict[str, list[float]]) -> Coefficients:
        return Coefficients(pi, pi, notes) if self.granularity == "batch" else Coefficients(r, head, notes)


def _said(evidence: Evidence, member: Member) -> Tensor:
    """log p (N, C) of one member of the panel."""
    if member == "ensemble":
        p = evidence.log_p().exp()
        valid = evidence.valid if bool(evidence.valid.any()) else torch.ones_like(evidence.valid)
        p = torch.where(evidence.valid[:, None, None], p, 1 / evidence.classes)
        return p[valid].mean(0).log()
    if member == "mean":
        return evidence.anchor_log_p("mean")
    return evidence.merged_log_p(member, ABOUT_THETA_0[member].merge)


def _ahead(said: dict[Member, Tensor], log_q: Tensor) -> Tensor:
    """By how much wise_ft agrees more than the mean with what the others of the panel say, summed over images.

    Agreement of a member: the probability that the consensus without it gives to the member's own answer.
    """
    if "mean" not in said or "wise_ft" not in said:
        return torch.zeros(1, dtype=torch.float64)
    M = len(said)

    def agreement(log_p: Tensor) -> Tensor:
        others = (M * log_q.exp() - log_p.exp()) / (M - 1)
        return others.gather(1, log_p.argmax(1, keepdim=True)).sum().double().cpu()

    return (agreement(said["wise_ft"]) - agreement(said["mean"]))[None]


def _drawn(r: Tensor, t: float, bank: Bank) -> Tensor:
    """Coefficients (..., K), or with the rest for theta_0 (..., K + A)."""
    if t == 1:
        return r
    whole = r.new_zeros(*r.shape[:-1], bank.K + bank.A)
    whole[..., : bank.K] = t * r
    whole[..., bank.anchor("theta_0")] = 1 - t
    return whole


def _consensus(said: list[Tensor]) -> Tensor:
    """log q (N, C): the mean of probabilities."""
    return torch.stack(said).logsumexp(0) - math.log(len(said))


def _scores(form: Literal["cross", "agreement"], log_p: Tensor, log_q: Tensor) -> Tensor:
    """s (..., N) of log p (..., N, C) against the consensus log q (N, C)."""
    floor = log_q.clamp(min=math.log(torch.finfo(log_q.dtype).tiny))
    if form == "agreement":
        return (log_p + floor).logsumexp(-1)
    return (log_p.exp() * floor).sum(-1) - entropy(log_p)
