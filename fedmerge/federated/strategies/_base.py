"""Federated competitors: strategies that make ONE global model from the same hospitals and the same theta_0, round by round.

A kind is one file in `federated/strategies/`, named in a scenario's `federated`. What aggregates is a strategy of Flower's
Message API, its own or one that it lacks; how hospitals train in a round is the same for all, so that only the strategy differs.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedmerge.federated.statistics._base import Statistic
from fedmerge.registry import Folder, Label, Plugin

MOMENTUM = 0.9
"""Of sgd."""


Optimizer = Literal["adam", "adamw", "sgd"]


VERSION = 4
"""Raise it whenever the same strategy would make another model."""


class Strategy(Plugin):
    """Base of every kind: how often hospitals are asked, and how each of them trains meanwhile."""

    paper: ClassVar[str]
    """Where it comes from."""

    rounds: int = Field(5, strict=True, ge=1, le=1000, description="number of rounds")
    epochs: int | None = Field(
        None,
        strict=True,
        ge=1,
        description="local epochs of a round; default: all rounds together have the steps of a hospital's own training",
    )
    fraction: float = Field(
        1.0, gt=0, le=1, description="share of the hospitals that take part in a round, drawn anew for each round"
    )
    optimizer: Optimizer | None = Field(
        None, description="optimizer of the hospitals, which begins anew in each round; default: that of the scenario's training"
    )
    lr: float | None = Field(
        None, gt=0, description="learning rate of the hospitals; default: that of run 0 of the scenario's training"
    )
    label: Label | None = Field(None, description="name of the row in tables; default: the strategy and its rounds")

    @property
    def key(self) -> str:
        """The name in tables, in the pool and in messages."""
        return self.label or f"{self.kind()}-{self.rounds}"

    @property
    def own_key(self) -> str:
        """Where the server's own step stands in a scenario; empty if it makes none that could be too long."""
        return f"{self.key}.server_lr" if "server_lr" in type(self).model_fields else ""

    @property
    def remark(self) -> str:
        """What a reader of the table must know about this row, or nothing."""
        return ""

    @property
    def least(self) -> int:
        """Hospitals that have to answer a round, or nothing can be made of it."""
        return 1

    @property
    def proximal(self) -> float:
        """mu of the term mu/2 ||theta - theta^r||^2 in every hospital's loss; 0 leaves it out."""
        return 0.0

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What a hospital sends beside its weights in a round."""
        return ()

    @abstractmethod
    def server(self) -> Any:
        """A strategy of Flower's Message API. It is shown the hospitals of one round at a time, all of which have been asked."""

    def chosen(self, sites: int) -> int:
        """Hospitals that are asked in a round, of so many."""
        return int(self.fraction * sites + 1e-9)

    def fields(self) -> dict[str, Any]:
        """All that determines the model, for the report and for the fingerprint."""
        return self.model_dump(mode="json", exclude={"label"})

    def digest(self, initial_sha256: str, sites: list[str]) -> str:
        """Of all that determines the global model: theta_0 and the fingerprints of what the sites would train by themselves."""
        whole = {"version": VERSION, "strategy": self.fields(), "initial": initial_sha256, "sites": sites}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


STRATEGIES: Folder[Strategy] = Folder("fedmerge.federated.strategies", Strategy, "strategy")  # type: ignore[type-abstract]

ALL_OF_THEM: dict[str, Any] = {"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": 1}
"""For Flower's own strategies: who is asked is drawn before, and evaluation is the target's."""
