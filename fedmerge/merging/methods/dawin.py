"""Coefficients from every image's entropies, gathered into a few clusters, one merge for each."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Adaptive, State
from fedmerge.merging.methods._expertise import Score, moments, scores, shares, with_offset
from fedmerge.merging.scoring.clustering import Clusters, kmeans, mixture, nearest_center
from fedmerge.merging.state import places


class Dawin(Adaptive):
    """lambda_k(x) = e^-H_k(x) / sum_j e^-H_j(x) (Eq. 1); images of a batch are clustered by lambda, and each cluster has one merge.

    Entropies are of temperature-scaled logits. `offset` is Eq. 2. `scope` says which images the offset and the clusters see: this
    batch, all batches so far, or the whole stream (as in the authors' code), which is transductive and never ranked.
    Clusters: for two experts a Beta mixture, for more k-means on the simplex (`auto`); `dirichlet` fits precisions too;
    `scope_mean` is one mean for all, which is what the authors' multi-task code does in effect. Note that e^-H lies in [1/C, 1], so
    that two experts and two classes allow only [1/3, 2/3].
    `form` for multi-task merging about theta_0: `convex` has sum 1; `paper` 0.3 in all, `code` 0.3 K.
    Where sources differ: paper and code start, stop and assign the mixture differently (scoring/clustering.py follows the code).
    Worked example: H = (0, ln 3): lambda = (1, 1/3) / (4/3) = (0.75, 0.25).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> sure, unsure = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.1, 0.2]))
    >>> adapt = fedmerge.Adapter(model, {"sure": sure, "unsure": unsure}, "dawin", clusters=1)
    >>> adapt(torch.tensor([[3.0], [0.1]])).argmax(1)
    tensor([0, 0])
    >>> adapt.coefficients.encoder  # one merge for the batch, as there is one cluster
    tensor([[0.5845, 0.4155],
            [0.5845, 0.4155]], dtype=torch.float64)
    """

    paper: ClassVar[str] = "Oh et al., DaWin: Training-free dynamic weight interpolation, ICLR 2025"
    cost: ClassVar[str] = "2K"
    needs: ClassVar[frozenset[str]] = frozenset({"temperature"})

    scope: Literal["batch", "prefix", "full"] = Field(
        "batch", description="images from which offset and clusters are computed: this batch, all so far, or the whole stream"
    )
    offset: bool = Field(False, description="whether the offset of Eq. 2 is used")
    clusters: int = Field(3, ge=1, le=1000, description="M, the largest number of merges per batch")
    clustering: Literal["auto", "kmeans", "beta", "dirichlet", "scope_mean"] = Field(
        "auto", description="algorithm that finds the clusters"
    )
    score: Score = Field(
        "entropy", description="how coefficients follow from predictions: Eq. 1, or an alternative of the paper's table D"
    )
    form: Literal["convex", "paper", "code"] = Field("convex", description="sum of the coefficients: 1, scale, or K scale")
    scale: float = Field(0.3, ge=0, le=2, description="lambda_0 of the multi-task forms")
    wise_alpha: float = Field(1.0, ge=0, le=1, description="factor of all coefficients; theta_0 gets the rest")
    calibrated: bool = Field(True, description="whether logits are first divided by each site's temperature")
    seed: int = Field(1, ge=0, description="seed of the clusters' starts, and of scores that are drawn")

    @property
    def needed(self) -> frozenset[str]:
        """Temperatures, and theta_0 where coefficients do not sum to 1."""
        return self.needs | (frozenset({"theta_0"}) if self.form != "convex" or self.wise_alpha < 1 else frozenset())

    @property
    def transductive(self) -> bool:
        """Whether the scope is the whole stream."""
        return self.scope == "full"

    def survey(self, state: State, evidence: Evidence) -> State:
        """One batch of the first pass over the stream: moments of the entropies, and the scores."""
        found = self._scores(evidence)
        score = torch.cat([state["score"], found], 1) if "score" in state else found
        return {**moments(state, evidence.entropies(self.calibrated)), "score": score}

    def carried(self, state: State, before: tuple[str, ...], bank: Bank) -> State:
        """The prefix is the images that all experts of now have seen: none when a newcomer is among them, else all so far."""
        kept = places(before, bank.names)
        return {} if kept is None else {name: value[kept] for name, value in state.items()}

    def coefficients(self, evidence: Evidence) -> Coefficients:
        """(N, K) with at most M distinct rows, for this batch as if it were the first; (N, K + A) where theta_0 takes part."""
        return self.step(self.start(evidence.bank), evidence)[1]

    def step(self, state: State, evidence: Evidence) -> tuple[State, Coefficients]:
        """Coefficients, given what has been seen in the scope."""
        seen = self.survey(state if self.scope == "prefix" else {}, evidence)
        if self.scope == "full" and state:
            seen = state
        own = self._scores(evidence)
        rows = self._grouped(self._rows(own, seen), seen)
        broken = torch.nonzero(~evidence.valid).flatten().tolist()
        if broken:  # a cluster may have other images in it, and a density keeps its center off the edge
            rows = shares(rows.T.index_fill(0, torch.tensor(broken), 0))
        alpha = self._placed(rows, evidence.bank)
        kept = {} if self.scope == "batch" else seen
        return kept, Coefficients(alpha, alpha, {"invalid": broken} if broken else {})

    def _scores(self, evidence: Evidence) -> Tensor:
        return scores(self.score, evidence, self.calibrated, self.seed).cpu()

    def _rows(self, score: Tensor, seen: State) -> Tensor:
        """lambda (N, K) before clustering."""
        return with_offset(score, seen) if self.offset else shares(score)

    def _grouped(self, rows: Tensor, seen: State) -> Tensor:
        """Every row as its cluster's, (N, K)."""
        scope = self._rows(seen["score"], seen)
        if self.clustering == "scope_mean":
            return scope.mean(0).expand_as(rows)
        found = self._clusters(scope)
        if len(scope) == len(rows) and torch.equal(scope, rows):
            return found.rows
        return found.centers[nearest_center(rows, found.centers)] if not self._by_density(rows) else _members(scope, found, rows)

    def _by_density(self, rows: Tensor) -> bool:
        how = self.clustering
        return how in ("beta", "dirichlet") or (how == "auto" and rows.shape[1] == 2)

    def _clusters(self, rows: Tensor) -> Clusters:
        find = mixture if self._by_density(rows) else kmeans
        return find(rows, self.clusters, self.seed)

    def _placed(self, rows: Tensor, bank: Bank) -> Tensor:
        """Rows with the sum that the form wants, and theta_0's share beside them."""
        total = {"convex": 1.0, "paper": self.scale, "code": self.scale * bank.K}[self.form] * self.wise_alpha
        if total == 1 and self.form == "convex":
            return rows
        whole = rows.new_zeros(len(rows), bank.K + bank.A)
        whole[:, : bank.K] = total * rows
        whole[:, bank.anchor("theta_0")] = 1 - total
        return whole


def _members(scope: Tensor, found: Clusters, rows: Tensor) -> Tensor:
    """Each row's center: that of the row of the scope which is nearest to it, so that rows of the scope keep their own."""
    return found.centers[found.member[nearest_center(rows, scope)]]
