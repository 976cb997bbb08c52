"""Upper bounds that look at the labels: what adaptive merging could reach, and what choosing an expert could."""

from __future__ import annotations

from itertools import product
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Adaptive, State

STEP = {1: 1.0, 2: 0.05, 3: 0.1}
"""Grid on the simplex by number of experts; for more: the corners, the middle, and 256 random points."""


class Oracle(Adaptive):
    """Needs labels; never ranked.

    sample:  lambda_k = p_k(y|x) / sum_j p_j(y|x), one merge for every image (Oh et al.).
    domain:  the coefficients on a grid with the best accuracy on the whole domain of an image.
    select:  for every image an expert that is right, if there is one: how much the experts cover together.
    batch, stream: the expert with the best accuracy on this batch, or on the whole stream.
    Worked example: p_1(y) = 0.6 and p_2(y) = 0.2: lambda = (0.75, 0.25).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> a, b = ({"weight": torch.tensor(p).log()[:, None]} for p in ([0.9, 0.1], [0.3, 0.7]))
    >>> adapt = fedmerge.Adapter(model, [a, b], "oracle")
    >>> adapt(torch.ones(1, 1), labels=torch.tensor([0])).argmax(1)
    tensor([0])
    >>> adapt.coefficients.encoder
    tensor([[0.7500, 0.2500]], dtype=torch.float64)
    """

    paper: ClassVar[str] = "Oh et al., DaWin: Training-free dynamic weight interpolation, ICLR 2025 (oracles)"
    cost: ClassVar[str] = "2K"
    needs: ClassVar[frozenset[str]] = frozenset({"labels"})
    ranked: ClassVar[bool] = False
    exceptions: ClassVar[dict[str, str]] = {"order": "where several points are as good, the first is taken"}

    by: Literal["sample", "domain", "select", "batch", "stream"] = Field(
        "sample", description="choice that is made with the labels"
    )
    seed: int = Field(0, ge=0, description="seed of the grid's random points, for four experts or more")

    @property
    def transductive(self) -> bool:
        """Whether it must see the whole stream first."""
        return self.by in ("domain", "stream")

    @property
    def remark(self) -> str:
        """What this row is for."""
        return "an upper bound: looks at the labels"

    def survey(self, state: State, evidence: Evidence) -> State:
        """Right predictions of one more batch: by domain and grid point (D, G), or by expert (1, K)."""
        answer = evidence.answer
        if self.by == "stream":
            right = self._right(evidence).sum(1)[None]
        else:
            points = grid(evidence.bank.K, self.seed)
            hits = [self._merged_right(point, evidence) for point in points]
            evidence.charge(len(points))
            by_domain = torch.nn.functional.one_hot(answer.domains).double().T  # (D, N)
            right = by_domain @ torch.stack(hits).double().T
        before = state.get("right", right.new_zeros(0, right.shape[1]))
        size = max(len(before), len(right))
        return {"right": _padded(before, size) + _padded(right, size)}

    def coefficients(self, evidence: Evidence) -> Coefficients:
        """For this batch alone; what is decided by the stream is then decided by this batch."""
        return self.step(self.survey({}, evidence) if self.transductive else {}, evidence)[1]

    def step(self, state: State, evidence: Evidence) -> tuple[State, Coefficients]:
        """Coefficients (N, K), or (K,) where one expert is chosen for all."""
        K, answer = evidence.bank.K, evidence.answer
        truth = evidence.log_p().gather(2, answer.labels.expand(K, -1)[..., None])[..., 0].exp()  # p_k(y|x), (K, N)
        truth = torch.where(evidence.valid[:, None], truth, 0).double().cpu()
        match self.by:
            case "sample":
                total = truth.sum(0)
                rows = torch.where(total > 0, truth / total.clamp(min=1e-300), 1 / K).T
            case "select":
                rows = _chosen((self._right(evidence) + truth).argmax(0), K)
            case "batch":
                rows = _chosen((self._right(evidence).sum(1) + truth.mean(1) / 2).argmax(), K)
            case "stream":
                rows = _chosen(state["right"][0].argmax(), K)
            case "domain":
                best = grid(K, self.seed)[state["right"].argmax(1)]  # (D, K)
                rows = best[answer.domains.cpu()]
        return state, Coefficients(rows, rows)

    def _right(self, evidence: Evidence) -> Tensor:
        """Whether each expert is right about each image (K, N), as float64."""
        right = evidence.log_p().argmax(-1) == evidence.answer.labels
        return (right & evidence.valid[:, None]).double().cpu()

    def _merged_right(self, point: Tensor, evidence: Evidence) -> Tensor:
        bank = evidence.bank
        logits = bank.forward(bank.mix(point), evidence.batch, point)
        return ((logits.argmax(-1) == evidence.answer.labels) & torch.isfinite(logits).all(-1)).cpu()


def grid(K: int, seed: int) -> Tensor:
    """Points of the simplex among which the oracle chooses.

    Parameters
    ----------
    K : int
        Experts.
    seed : int
        Of points that are drawn.

    Returns
    -------
    Tensor
        (G, K).

    Examples
    --------
    >>> from fedmerge.merging.methods.oracle import grid
    >>> grid(2, seed=0).shape
    torch.Size([21, 2])
    >>> grid(2, seed=0)[:2]
    tensor([[0.0000, 1.0000],
            [0.0500, 0.9500]], dtype=torch.float64)
    """
    if K in STEP:
        n = round(1 / STEP[K])
        points = [point for point in product(range(n + 1), repeat=K) if sum(point) == n]
        return torch.tensor(points, dtype=torch.float64) / n
    generator = torch.Generator().manual_seed(seed)
    drawn = -torch.rand(256, K, generator=generator, dtype=torch.float64).log()
    corners, middle = torch.eye(K, dtype=torch.float64), torch.full((1, K), 1 / K, dtype=torch.float64)
    return torch.cat([corners, middle, drawn / drawn.sum(1, keepdim=True)])


def _chosen(expert: Tensor, K: int) -> Tensor:
    """One-hot rows."""
    return torch.nn.functional.one_hot(expert, K).double()


def _padded(counts: Tensor, rows: int) -> Tensor:
    return torch.cat([counts, counts.new_zeros(rows - len(counts), counts.shape[1])])
