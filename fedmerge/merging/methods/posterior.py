"""A model for every image, or every batch, from the posterior of the site that it resembles.

The story: each image of a batch comes from a site k, drawn with shares pi that drift from batch to batch, and has a label y, drawn
with shares b of this batch. Nobody tells k; what tells of it is how the site's expert speaks about the image. An expert that knows
such images is sure of them, and right; being right cannot be seen, but agreeing with models that fail in other ways can:

    q(c | x)  = mean of the predictions of a panel of models             consensus
    s_ik      = -H(p_k(. | x_i)) + sum_c p_k(c | x_i) log q(c | x_i)     evidence: sure, and of one mind with the consensus
    p(k, y | x_i) proportional to pi_k exp(beta s_ik) p_k(y | x_i) b_y   EM over the batch: r_ik, pi, b
    theta(x_i) = t sum_k r_ik theta_k + (1 - t) theta_0                  one encoder for the image, or with pi one for the batch

and its head is sum_k r_ik of the experts' heads: theta_0's head has learned least, and half of it would make answers unsure.

Heads are first brought to one scale: one that is more than twice as long as the others' median is divided by that multiple, in p_k
and in all merges. Who multiplies a head answers as before, but as surely as it likes, and outweighs the others in every sum.
Of two experts nobody can tell which is odd.

What the experts say together tells how far to go from theta_0, and whether to merge weights at all: a merge may say otherwise
than their ensemble where they disagree, and not where they are sure. t is 1/2 where the mean, drawn half-way to theta_0, keeps the
ensemble's answers for the surest half of the stream's images: experts of one site each have gone further than a hospital that
resembles several of them wants. Where it gives up 6 % of them t grows, and from 8 % on it is 1; also where it gives up 7 to 9 %
more of all answers than the mean does. Then theta_0 knows too little. Where it gives up 5 % of those of the surest answers that all
experts give, models between experts and theta_0 are not what the experts are. Then predictions are mixed, sum_k r_ik p_k(y | x_i),
with even shares and evidence against the ensemble alone: merges have no say. The notes say so (`mixed_predictions`).

Where the mean is nearer to theta_0 than a twentieth of theta_0's length, as after pretraining on many images, half-way does not
tell how the experts mix: theta_0's head has not learned their classes, and t is 1. Experts so near one another often lie in one
basin (Neyshabur et al., What is being transferred in transfer learning?, NeurIPS 2020): predictions are mixed where the mean itself
gives up 8 % of the surest answers.
Where nobody can tell what half-way gives up, predictions are mixed where the mean gives up 5 % of the surest answers. More than ten
experts give hardly any answer together: there half-way has to give up 8 % of the surest answers, and the mean 5 %.

b is what the consensus says of the batch (where predictions are mixed, what the ensemble says), with `label_prior: batch` alone,
and even otherwise. Either is taken to be as sure as the panel agrees with it (`agreement.temperature`).

What an assumption costs when it is wrong. Sites that are alike: all s_ik are alike, r is even, and the merge is the mean's.
Evidence fooled by a sure expert: the consensus disagrees, and its cross entropy grows with its sureness. A crowd
of bad experts: the panel's models that are drawn towards theta_0 disagree with them. Batches without shared sites: pi is even, and
each image's evidence decides alone. Many experts, and few images of each: one image more of every expert keeps shares near even
ones. Label shares that are even: they do not pay for their parameters, and stay even. Experts that are all bad: their evidence is
alike, r is even, and the merge is the mean merge, which is of the panel; the notes have the shares, and how far the evidence of the
best is above the mean of all.

With `active: auto` and more than 24 experts a batch is shown to some of them: see `scoring/active.py`. The others take part in EM
as one, which has the images of them all, and the mean likelihood of those who are asked in turn: these are a sample of them. They
are merged by their shares, as one model for all images; what is left is the posterior of those who are asked. Where these have
less than half of the shares they cannot tell for all whether weights mix, and predictions are not mixed. The panel's merges are
of all experts, and made once. What the posterior answers is compared with them; where they differ more than they used to, the
batch is shown to more. The notes say how many have been asked (`forwarded`), how many of these were active before (`active`), and
whether there was an alarm (`alarm`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes, inner_products
from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Adaptive, State, Static
from fedmerge.merging.methods.mean import Mean
from fedmerge.merging.methods.model_stock import ModelStock
from fedmerge.merging.methods.wise_ft import WiseFt
from fedmerge.merging.scoring import active
from fedmerge.merging.scoring.agreement import (
    BINS,
    TEMPERATURES,
    answers_alike,
    confidences,
    of_the_surest,
    other_answers,
    temperature,
)
from fedmerge.merging.scoring.divergence import entropy
from fedmerge.merging.scoring.latent import label_shares, site_shares, under
from fedmerge.merging.scoring.outliers import over_others
from fedmerge.merging.state import carried_rows

Member = Literal["ensemble", "mean", "wise_ft", "model_stock"]
HALF_WAY = WiseFt()
ABOUT_THETA_0 = {"wise_ft": HALF_WAY, "model_stock": ModelStock()}

LOST = (0.06, 0.08)
"""Share of the surest answers that half-way to theta_0 gives up, up to which it is gone, and from which on not at all."""

BEHIND = (0.07, 0.09)
"""The same for the share of all answers that it gives up, less that of the mean."""

APART = 1 / 20
"""Share of the surest answers that all experts give, which half-way may give up before weights are not mixed."""

MANY = 10
"""Experts of whom more give hardly any answer together."""

BASIN = 1 / 20
"""Distance of the mean from theta_0, in lengths of theta_0, below which half-way between them tells nothing of the experts."""

PAIR = 2
"""Experts of whom nobody can tell which is odd."""

ODD = 2.0
"""Length of an expert's head, as a multiple of the others' median, above which it is brought to theirs."""

PRIOR_IMAGES = 32
"""Images on which no answer was given up that count as seen before the first batch."""

PRIOR_ALIKE = 8
"""The same for images on which all experts agree."""


class Posterior(Adaptive):
    """theta_i = sum_k r_ik theta_k, r_ik the posterior of image i's site, by EM over sites and labels of the batch.

    Without theta_0 the panel is the ensemble and the mean. Worked example (K = 2, C = 2, one image, even shares, beta 1):
    q = (0.7, 0.3), p_1 = (0.9, 0.1), p_2 = (0.5, 0.5) give s = (-0.766, -1.473), and r = (0.670, 0.330).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> sure, unsure = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.1, 0.2]))
    >>> adapt = fedmerge.Adapter(model, {"sure": sure, "unsure": unsure}, "posterior")
    >>> adapt(torch.tensor([[3.0], [1.0], [-2.0]])).argmax(1)
    tensor([0, 0, 1])
    >>> adapt.coefficients.encoder.round(decimals=2)
    tensor([[0.9000, 0.1000],
            [0.8600, 0.1400],
            [0.9000, 0.1000]], dtype=torch.float64)
    """

    paper: ClassVar[str] = "fedmerge, this project, 2026"
    cost: ClassVar[str] = "2K + 4"
    exceptions: ClassVar[dict[str, str]] = {
        "cost": "one forward less while the merge is not drawn towards theta_0, and K + 1 less where predictions are mixed"
    }

    granularity: Literal["image", "batch"] = Field(
        "image", description="one merge for each image, or one for the batch; mixed predictions have weights of each image in both"
    )
    panel: tuple[Member, ...] = Field(
        ("ensemble", "mean", "wise_ft", "model_stock"), min_length=1, description="models whose mean prediction is the consensus"
    )
    evidence: Literal["cross", "agreement"] = Field("cross", description="s_ik as above, or log sum_c p_k(c | x_i) q(c | x_i)")
    beta: float = Field(1.0, ge=0, le=1e6, description="sharpness of the evidence, per nat")
    head_beta: float | None = Field(None, ge=0, le=1e6, description="that of the head; default beta")
    em: bool = Field(True, description="learn the sites' shares from the batch; false: from the past alone")
    shrink: Literal["none", "half", "agreed"] = Field(
        "agreed",
        description="half: encoders are drawn half-way to theta_0; agreed: less where that gives up what the ensemble is sure of",
    )
    fallback: Literal["mixture", "none"] = Field(
        "mixture",
        description="mixture: of the experts' predictions, where merges of their weights give up what the experts are sure of",
    )
    rho: float = Field(0.5, ge=0, lt=1, description="weight of the past in the sites' shares")
    active: Literal["all", "auto"] = Field(
        "all",
        description="who sees a batch: all experts; auto: of more than 24, those that recent batches resembled, and others in turn",
    )

    def start(self, bank: Bank) -> State:
        """Even shares, and no answer given up."""
        f64 = torch.float64
        trust = torch.zeros(1 + len(TEMPERATURES), dtype=f64)
        state = {"pi": torch.full((bank.K,), 1 / bank.K, dtype=f64), "answers": torch.zeros(BINS, 5, dtype=f64), "trust": trust}
        return state | active.start(bank.K) if self._selects(bank) else state

    def carried(self, state: State, before: tuple[str, ...], bank: Bank) -> State:
        """Who stays keeps its share, and who is new has an even one; with the next batch all sum to 1 again.

        Where experts are selected, who is new is asked next.
        """
        fresh = self.start(bank)
        pi = carried_rows(state["pi"], before, bank.names, fresh["pi"])
        kept = {name: value for name, value in state.items() if name not in active.start(1)}
        if self._selects(bank):
            return kept | {"pi": pi} | active.carried(state, before, bank.names)
        return kept | {"pi": torch.where(pi > 0, pi, fresh["pi"])}  # who was not active is asked again

    def _selects(self, bank: Bank) -> bool:
        return self.active == "auto" and bank.K > active.FEW

    def working_bytes(self, sizes: Sizes) -> int:
        """The panel's merged models, and the most that one of their merges needs at once."""
        merged = [ABOUT_THETA_0[member] for member in self.panel if member in ABOUT_THETA_0]
        return 4 * sizes.parameters * len(merged) + max((method.working_bytes(sizes) for method in merged), default=0)

    def coefficients(self, evidence: Evidence) -> Coefficients:
        """For this batch alone: (N, K), or (K,) with granularity batch while weights are merged."""
        return self.step(self.start(evidence.bank), evidence)[1]

    def step(self, state: State, evidence: Evidence) -> tuple[State, Coefficients]:
        """Posteriors given the past, and the shares that the batch leaves."""
        state, found = self._of_all(state, evidence)
        scale = _head_scale(evidence.bank)
        return state, found if scale is None else replace(found, scale=scale, notes=dict(found.notes) | {"scale": scale.tolist()})

    def _of_all(self, state: State, evidence: Evidence) -> tuple[State, Coefficients]:
        """The same, with heads of one scale."""
        if not self._selects(evidence.bank):
            return self._step(state, evidence)[:2]
        bank, pi = evidence.bank, state["pi"]
        was, others = active.candidates(state, pi, bank.names)
        for more in (len(others) + active.WIDE, None):
            rows = sorted([*was, *others])
            some, past = evidence.only(rows), torch.where(pi[rows] > 0, pi[rows], 1 / bank.K)
            rest = pi.index_fill(0, torch.tensor(rows), 0)
            past, rest = (part / (past.sum() + rest.sum()) for part in (past, rest))
            after, found, different = self._step({**state, "pi": past}, some, rest.sum(), [row in others for row in rows])
            if more is None:
                break
            apart, alarm = active.alarmed(state, different, len(evidence.batch))
            if not alarm and bool(some.valid.any()):
                break
            was, others = active.candidates(state, pi, bank.names, more)
        rest = rest * ((1 - after["pi"].sum()) / rest.sum().clamp(min=torch.finfo(rest.dtype).tiny))
        pi = rest.index_add(0, torch.tensor(rows), after["pi"] * some.valid.cpu())
        counts = {"forwarded": [float(len(rows))], "active": [float(len(was))], "alarm": [float(alarm)], "shares": pi.tolist()}
        found = replace(_among(found, rows, rest, bank), notes=dict(found.notes) | counts)
        return {**after, **apart, **active.asked(state, rows), "pi": pi}, found

    def _step(
        self, state: State, evidence: Evidence, rest: Tensor | None = None, sample: list[bool] | None = None
    ) -> tuple[State, Coefficients, int]:
        """For the experts of the evidence: shares, coefficients, and images on which the mixture answers otherwise than the panel's
        merges. rest: the shares of all others together, of whom some of the experts are a sample (R,)."""
        members, scale = self._members(evidence.bank), _head_scale(evidence.bank)
        scale = None if scale is None else scale[evidence.asked]
        log_p = evidence.scaled_log_p(scale)
        said = {member: _said(evidence, member, log_p) for member in members}
        log_q = _consensus([*said.values()])
        s = torch.where(evidence.valid[:, None], _scores(self.evidence, log_p, log_q), -torch.inf).double().cpu().T  # (N, K)
        notes = {"panel": [float(member in members) for member in ("ensemble", "mean", "wise_ft", "model_stock")]}
        if not bool(evidence.valid.any()):
            even = torch.full((evidence.K,), 1 / evidence.K, dtype=torch.float64)
            nothing_known = torch.full((evidence.classes,), 1 / evidence.classes, dtype=torch.float64)
            return state | {"b": nothing_known}, self._given(even.expand_as(s), even.expand_as(s), even, notes), 0
        answers = state["answers"] + _answers(said, log_p[evidence.valid])
        t, apart = self._judged(answers, evidence.bank)
        apart = apart and (rest is None or bool(rest <= state["pi"].sum()))
        state = self._labels(state, said, said["ensemble"] if apart else log_q)
        known = (log_p.double().cpu().exp().nan_to_num() @ state["b"] * evidence.classes).clamp(min=1e-300).log().T  # (N, K)
        pi = self._shares(state["pi"], _weighed(s, self.beta) + known, evidence.bank.K, rest, sample)
        valid = evidence.valid.cpu()
        betas = (self.beta, self.beta if self.head_beta is None else self.head_beta)
        r, head = ((pi.log() + known + _weighed(s, beta)).softmax(1) for beta in betas)
        asked = 1.0 if rest is None else float(pi.sum())
        kept = pi if self.em else self.rho * pi + (1 - self.rho) * asked * r.mean(0)
        evidences = s.mean(0)[valid]
        notes |= {"shares": pi.tolist(), "ahead": [float(evidences.max() - evidences.mean())], "towards_theta_0": [1 - t]}
        notes |= {"mixed_predictions": [float(apart)]}
        state |= {"pi": kept, "answers": answers}
        different = _different(evidence.mixture(r, scale), said) if self._selects(evidence.bank) else 0
        if apart:
            against = torch.where(evidence.valid[:, None], _scores(self.evidence, log_p, said["ensemble"]), -torch.inf)
            r = _weighed(against.double().cpu().T, self.beta).softmax(1)
            return state, Coefficients(r, r, notes, of="predictions"), different
        of_batch = pi / asked if bool(valid.all()) else torch.where(valid, pi, 0) / pi[valid].sum()
        found = self._given(r, head, of_batch, notes)
        if t < 1:  # theta_0 has a part of the encoder, and none of the head
            found = replace(found, encoder=_drawn(found.encoder, t, evidence.bank), head=_drawn(found.head, 1.0, evidence.bank))
        return state, found, different

    def _shares(self, past: Tensor, scores: Tensor, K: int, rest: Tensor | None, sample: list[bool] | None) -> Tensor:
        """pi (R,) of those who are asked, by EM; the rest takes part in it as one, whose evidence is the mean of the sample's."""
        if rest is None or sample is None:
            past = past / past.sum()
            return self.rho * past + (1 - self.rho) * site_shares(scores, past)[1] if self.em else past
        past = torch.cat([past, rest[None]]) / (past.sum() + rest)
        if not self.em:
            return past[:-1]
        of_rest = scores[:, sample].logsumexp(1, keepdim=True) - math.log(max(1, sum(sample)))
        each = torch.ones_like(past).index_fill(0, torch.tensor([len(past) - 1]), K - scores.shape[1])
        found = site_shares(torch.cat([scores, of_rest], 1), past, each)[1]
        return (self.rho * past + (1 - self.rho) * found)[:-1]

    def _labels(self, state: State, said: dict[Member, Tensor], log_q: Tensor) -> State:
        """With b (C,), the batch's shares of labels as log q (N, C) sees them."""
        C = log_q.shape[1]
        if self.label_prior == "none":
            return state | {"b": torch.full((C,), 1 / C, dtype=torch.float64)}
        trust = state["trust"] + torch.cat([answers_alike(log_q, [*said.values()]).sum()[None], confidences(log_q)])
        T = temperature(trust[0], trust[1:])
        batch, stream, seen = label_shares((log_q / T).log_softmax(1), state)
        b = batch if self.label_prior == "batch" else stream
        return state | seen | {"trust": trust, "b": b}

    def under_labels(self, state: State, seen: State, log_p: Tensor) -> tuple[State, Tensor]:
        """Under the shares that the consensus has told; it remembers them by itself."""
        even = bool((state["b"] == state["b"][0]).all())
        return seen, log_p if even else under(state["b"], log_p)

    def _judged(self, answers: Tensor, bank: Bank) -> tuple[float, bool]:
        """How far the merge goes from theta_0, and whether predictions are mixed instead of weights."""
        images, mean, half, alike, given_up = of_the_surest(answers).tolist()
        mean_gives_up = mean > APART * (images + PRIOR_IMAGES)
        mixed = self.fallback == "mixture"
        drawn = self.shrink != "none" and "theta_0" in bank.anchors and bank.shared_head
        if drawn and self.shrink == "half":
            return 0.5, False
        if not drawn or not {"ensemble", "mean", "wise_ft"} <= {*self.panel}:  # nobody tells what half-way gives up
            return 1.0, mixed and mean_gives_up
        if _gone(bank) < BASIN:
            return 1.0, mixed and mean > LOST[1] * (images + PRIOR_IMAGES)
        everywhere = answers.sum(0)
        lost = _part(half / (images + PRIOR_IMAGES), LOST)
        behind = _part(float((everywhere[2] - everywhere[1]) / (everywhere[0] + PRIOR_IMAGES)), BEHIND)
        apart = mean_gives_up and lost == 1 if bank.K > MANY else given_up > APART * (alike + PRIOR_ALIKE)
        return 0.5 + 0.5 * max(lost, behind), mixed and apart

    def _members(self, bank: Bank) -> tuple[Member, ...]:
        return tuple(member for member in self.panel if member not in ABOUT_THETA_0 or "theta_0" in bank.anchors) or ("mean",)

    def _given(self, r: Tensor, head: Tensor, pi: Tensor, notes: dict[str, list[float]]) -> Coefficients:
        return Coefficients(pi, pi, notes) if self.granularity == "batch" else Coefficients(r, head, notes)


def _said(evidence: Evidence, member: Member, log_p: Tensor) -> Tensor:
    """log p (N, C) of one member of the panel; log_p (K, N, C) is that of the experts."""
    if member == "ensemble":
        p = log_p.exp()
        valid = evidence.valid if bool(evidence.valid.any()) else torch.ones_like(evidence.valid)
        p = torch.where(evidence.valid[:, None, None], p, 1 / evidence.classes)
        return p[valid].mean(0).log()
    if member != "mean":
        return evidence.merged_log_p(member, partial(_merged, ABOUT_THETA_0[member]))
    if evidence.K == evidence.bank.K and _head_scale(evidence.bank) is None:
        return evidence.anchor_log_p("mean")
    return evidence.merged_log_p("mean of all", partial(_merged, Mean()))


def _merged(method: Static, bank: Bank) -> Tensor:
    """The merge (P,) of experts whose heads have one scale."""
    theta, scale = method.merge(bank), _head_scale(bank)
    if scale is not None:
        theta[bank.head] = method.merge(bank.heads(scale))
    return theta


def _head_scale(bank: Bank) -> Tensor | None:
    """What experts' heads are divided by (K,), 1 for most; None if that is so for all. Of two nobody can tell which is odd.

    Measured once for these experts.
    """
    if "head scale" not in bank.kept:
        lengths = torch.linalg.vector_norm(bank.columns(bank.head).double(), dim=1).cpu()
        multiples = over_others(lengths) if bank.K > PAIR else torch.ones_like(lengths)
        bank.kept["head scale"] = torch.where(multiples > ODD, multiples, 1.0)
    scale = bank.kept["head scale"]
    return scale if bool((scale > 1).any()) else None


def _answers(said: dict[Member, Tensor], log_p: Tensor) -> Tensor:
    """(200, 5): by the ensemble's confidence, images, and those on which the mean, and the mean drawn half-way, answer otherwise;
    images on which all experts (log p (K, N, C)) agree, and those of them on which the mean drawn half-way answers otherwise.

    Zeros where the panel lacks the ensemble.
    """
    if "ensemble" not in said:
        return torch.zeros(BINS, 5, dtype=torch.float64)
    ensemble = said["ensemble"]
    mean, half = (said.get(member, ensemble) for member in ("mean", "wise_ft"))
    alike = (log_p.argmax(-1) == ensemble.argmax(1)).all(0)
    return torch.cat([other_answers(ensemble, [mean, half]), other_answers(ensemble[alike], [half[alike]])], 1)


def _weighed(s: Tensor, beta: float) -> Tensor:
    """beta s, and -inf for an expert that is not valid, also where beta is 0."""
    return torch.where(torch.isinf(s), -torch.inf, beta * s)


def _gone(bank: Bank) -> float:
    """How far the mean of the encoders is from theta_0, in lengths of theta_0; `wise_ft` of the panel lies between them.

    Measured once for these experts, as the panel's merges are made once.
    """
    if "gone" not in bank.kept:
        start, half = (row[None, None, bank.encoder] for row in (bank.anchor_row("theta_0"), bank.kept["wise_ft"]))
        bank.kept["gone"] = (inner_products(half, start[0]) / inner_products(start)).sqrt() / HALF_WAY.a
    return float(bank.kept["gone"])


def _different(mixture: Tensor, said: dict[Member, Tensor]) -> int:
    """Images on which the mixture of predictions answers otherwise than the panel's merges."""
    merges = [log_p.to(mixture) for member, log_p in said.items() if member != "ensemble"] or [mixture]
    return int((mixture.argmax(1) != _consensus(merges).argmax(1)).sum())


def _part(value: float, span: tuple[float, float]) -> float:
    """Where a value lies in a span: 0 up to its begin, 1 from its end on."""
    return min(1.0, max(0.0, (value - span[0]) / (span[1] - span[0])))


def _drawn(r: Tensor, t: float, bank: Bank) -> Tensor:
    """Coefficients (..., K + A): t r for the experts, and the rest for theta_0."""
    K = r.shape[-1]
    whole = r.new_zeros(*r.shape[:-1], K + bank.A)
    whole[..., :K] = t * r
    if t < 1:
        whole[..., K + bank.anchors.index("theta_0")] = 1 - t
    return whole


def _among(found: Coefficients, rows: list[int], rest: Tensor, bank: Bank) -> Coefficients:
    """Coefficients of some of the experts, by their rows, as those of all, where the others have the shares `rest` (K,).

    Predictions are mixed of those alone that there are.
    """
    at = torch.tensor([*rows, *(bank.K + number for number in range(bank.A))])
    rest = torch.zeros_like(rest) if found.of == "predictions" else rest

    def whole(alpha: Tensor) -> Tensor:
        width, anchors = alpha.shape[-1], alpha[..., len(rows) :]
        parts = torch.cat([(1 - rest.sum()) * alpha[..., : len(rows)], anchors], -1)
        every = alpha.new_zeros(*alpha.shape[:-1], bank.K + max(0, width - len(rows))).index_copy(-1, at[:width], parts)
        every[..., : bank.K] += (1 - anchors.sum(-1, keepdim=True)) * rest  # to the last bit the same for all images
        return every

    return replace(found, encoder=whole(found.encoder), head=whole(found.head))


def _consensus(said: list[Tensor]) -> Tensor:
    """log q (N, C): the mean of probabilities."""
    return torch.stack(said).logsumexp(0) - math.log(len(said))


def _scores(form: Literal["cross", "agreement"], log_p: Tensor, log_q: Tensor) -> Tensor:
    """s (..., N) of log p (..., N, C) against the consensus log q (N, C)."""
    floor = log_q.clamp(min=math.log(torch.finfo(log_q.dtype).tiny))
    if form == "agreement":
        return (log_p + floor).logsumexp(-1)
    return (log_p.exp() * floor).sum(-1) - entropy(log_p)
