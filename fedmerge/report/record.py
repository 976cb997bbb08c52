"""Everything that a run has shown, as the report needs it: plain records, no models, no hospitals' images but the granted ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.report.ledger import Ledger
from fedmerge.report.step import Step


@dataclass(frozen=True)
class SiteRow:
    """One hospital. samples: images that it agrees to show, uint8 (n, H, W, C). runs: hyper-parameters and accuracy of each."""

    name: str
    title: str
    trained: bool
    expert_sha256: str
    n: int
    validation_accuracy: float
    temperature: float
    runs: list[dict[str, float]]
    samples: NDArray[np.uint8] | None


@dataclass(frozen=True)
class MethodInfo:
    """One row of the table. remark: what a reader must know, or nothing. precomputes: whether a first pass gives coefficients."""

    paper: str
    kind: str
    needs: tuple[str, ...]
    gradient: bool
    ranked: bool
    hyper_parameters: dict[str, Any]
    remark: str
    precomputes: bool = False


@dataclass(frozen=True)
class StreamFacts:
    """The stream as it was. truth: (T, D), the share of every domain in every batch. conditions: family and severity of each."""

    kind: str
    batches: int
    samples: int
    unused: int
    index_sha256: str
    truth: NDArray[np.float64]
    domain_names: tuple[str, ...]
    conditions: tuple[tuple[str, int], ...] = ()

    @property
    def mix(self) -> tuple[NDArray[np.float64], list[str]]:
        """Shares (T, D) and their names; of whole families where domains are shifts, or there would be too many to tell apart."""
        families = list(dict.fromkeys(family for family, _ in self.conditions))
        if not families:
            return self.truth, list(self.domain_names)
        own = [[of == family for of, _ in self.conditions] for family in families]
        return np.stack([self.truth[:, columns].sum(1) for columns in own], 1), families


@dataclass(frozen=True)
class RunRecord:
    """A whole run. labels, domains: per batch, (n_t,) int64. forwards_run: per batch, with logits shared by all methods.

    steps: of all methods, in memory or on disk.
    """

    scenario: str
    question: str
    seed: int
    classes: tuple[str, ...]
    sites: list[SiteRow]
    target: str
    target_title: str
    target_samples: NDArray[np.uint8] | None
    initialisation: str
    stream: StreamFacts
    labels: list[NDArray[np.int64]]
    domains: list[NDArray[np.int64]]
    steps: list[Step] | Ledger
    methods: dict[str, MethodInfo]
    forwards_run: float
    audit: list[dict[str, Any]]
    manifest: dict[str, Any]
    yaml: str
    seconds: dict[str, float] = field(default_factory=dict)

    def steps_of(self, method: str) -> list[Step]:
        """The steps of one method in the order of the stream; their probabilities are to be had below alone."""
        if isinstance(self.steps, Ledger):
            return self.steps.steps_of(method)
        return [step for step in self.steps if step.method == method]

    def probabilities(self, method: str) -> NDArray[np.float32]:
        """Class probabilities (samples, C) of one method over the whole stream."""
        if isinstance(self.steps, Ledger):
            return self.steps.probabilities(method)
        return np.concatenate([step.probabilities for step in self.steps_of(method)])
