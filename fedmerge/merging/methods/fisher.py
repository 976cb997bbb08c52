"""The mean of the experts, every parameter weighted by how much each expert's predictions depend on it."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes
from fedmerge.merging.curvature.fisher import Estimator, diagonal
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Method, Online, State, Static
from fedmerge.merging.state import places


class Fisher(Static):
    """theta_j = sum_k c_k (F_kj + m) theta_kj / sum_k c_k (F_kj + m), c_k ~ 1/(||F_k|| + m) of sum 1, or 1/K.

    mode `site`: every site computes F_k on its own training images and uploads it, which doubles its upload. mode `target`: F_k of
    the first `samples` images of the stream, computed at the target with gradients; the model changes until they are seen. Images
    on which an expert's logits are not finite are passed over.
    Worked example: F_1 = (3, 1), F_2 = (1, 1), no normalization, m = 0, experts (0, 0) and (4, 4): theta = (1, 2).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> a, b = ({"weight": torch.tensor([row])} for row in ([0.0, 0.0], [4.0, 4.0]))
    >>> F = [{"weight": torch.tensor([row])} for row in ([3.0, 1.0], [1.0, 1.0])]
    >>> fedmerge.merge(model, [a, b], "fisher", statistics={"fisher": F}, normalize=False)["weight"]
    tensor([[1.0000, 2.0000]])
    """

    paper: ClassVar[str] = "Matena & Raffel, Merging models with Fisher-weighted averaging, NeurIPS 2022"

    mode: Literal["site", "target"] = Field("site", description="images from which F is computed: each site's own, or the target's")
    normalize: bool = Field(True, description="whether every expert's F is divided by its length, so that experts count equally")
    m: float = Field(1e-6, gt=0, description="m, added to F, so that parameters without influence are merged by the mean")
    samples: int = Field(500, ge=1, description="number of images of the stream, in mode target")
    estimator: Estimator = Field(
        "exact", description="estimator of F in mode target; in mode site, the upload `fisher` has this key"
    )

    @property
    def needed(self) -> frozenset[str]:
        """The statistic `fisher`, in mode site."""
        return frozenset({"fisher"}) if self.mode == "site" else frozenset()

    def expand(self, names: tuple[str, ...]) -> tuple[Method, ...]:
        """In mode target, a row that learns F from the stream."""
        return (self,) if self.mode == "site" else (_AtTarget(fisher=self, label=self.key),)

    def rule(self, bank: Bank) -> Tensor:
        """(P,). Raises CheckpointError if the sites uploaded no Fisher information."""
        return self.weighted(bank, bank.statistics.flat("fisher", self.kind()))

    @property
    def whole(self) -> bool:
        """F is as large as the parameters."""
        return True

    def working_bytes(self, sizes: Sizes) -> int:
        """F of all experts, its weights, and their product with the parameters."""
        return 3 * 4 * sizes.experts * sizes.parameters

    def weighted(self, bank: Bank, F: Tensor) -> Tensor:
        """The merge for F (K, P)."""
        F = F.to(bank.wide)
        c = 1 / (F.norm(dim=1) + self.m) if self.normalize else F.new_ones(len(F))
        weights = (c / c.sum())[:, None] * (F + self.m)
        return (weights * bank.theta.to(bank.wide)).sum(0) / weights.sum(0)


class _AtTarget(Online):
    """Fisher merging with F from the first images of the stream."""

    paper: ClassVar[str] = Fisher.paper
    gradient: ClassVar[bool] = True

    fisher: Fisher

    @classmethod
    def kind(cls) -> str:
        """Part of `fisher`."""
        return "fisher"

    @property
    def whole(self) -> bool:
        """F is as large as the parameters."""
        return True

    def working_bytes(self, sizes: Sizes) -> int:
        """As for Fisher information from sites, and F as it was."""
        return 4 * 4 * sizes.experts * sizes.parameters

    def start(self, bank: Bank) -> State:
        """Nothing seen."""
        return {"F": torch.zeros_like(bank.theta, dtype=bank.wide), "seen": torch.zeros((), dtype=torch.long)}

    def carried(self, state: State, before: tuple[str, ...], bank: Bank) -> State:
        """F of the images that all experts of now have seen: none when a newcomer is among them."""
        kept = places(before, bank.names)
        return self.start(bank) if kept is None else {"F": state["F"][kept], "seen": state["seen"]}

    def step(self, state: State, evidence: Evidence) -> tuple[State, Tensor]:
        """F of what has been seen, this batch included, and theta (P,)."""
        bank, seen = evidence.bank, int(state["seen"])
        x, left = evidence.batch[:0], self.fisher.samples - seen
        if left > 0:
            x = evidence.batch[torch.isfinite(evidence.logits).all(2).all(0)][:left]
        F = state["F"].to(bank.theta.device)
        if len(x):
            fresh = torch.stack([diagonal(bank.forward_of(k), row, x, self.fisher.estimator) for k, row in enumerate(bank.theta)])
            F = (seen * F + len(x) * fresh) / (seen + len(x))
            labels = 1 if self.fisher.estimator == "mc" else evidence.classes
            evidence.charge(bank.K * (1 + 3 * labels))
        return {"F": F, "seen": torch.tensor(seen + len(x))}, self.fisher.weighted(bank, F).to(bank.theta)
