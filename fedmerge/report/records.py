"""Everything that a run has shown, as the report needs it: plain records, no models, no hospitals' images but the granted ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.merging.predict import RowInfo
from fedmerge.merging.state import Roster
from fedmerge.report.batch_log import Ledger, Step


@dataclass(frozen=True)
class SiteRow:
    """One hospital. samples: images that it agrees to show, uint8 (n, H, W, C). runs: hyper-parameters and accuracy of each.

    signed: whether its upload was signed with its key. attack: what a simulated attacker does, or nothing. left_out: the check
    that kept its expert from the target, or nothing. brought: it was trained elsewhere, and not as the scenario has it.
    """

    name: str
    title: str
    trained: bool
    expert_sha256: str
    n: int | None
    validation_accuracy: float | None
    temperature: float
    runs: list[dict[str, float]]
    samples: NDArray[np.uint8] | None
    signed: bool = False
    attack: str = ""
    left_out: str = ""
    brought: bool = False


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
class Disputed:
    """Images on which methods disagree, as far as the target agrees to show them.

    places: in the stream, counted from its first image. images: uint8 (n, H, W, C).
    """

    places: tuple[int, ...]
    images: NDArray[np.uint8]


ANCHORS = ("theta_0", "generalist")
"""Whose coefficients may stand behind the experts', in the bank's order."""


@dataclass(frozen=True)
class RunRecord:
    """A whole run. labels, domains, and patients where they are known: per batch, (n_t,) int64.

    course: who was there when; everybody all the time if it is empty. steps: of all methods, in memory or on disk.
    novel: classes that no hospital has trained on, where prompts make heads. tasks: classes of the target by hospitals, where these
    have tasks of their own, and the target two of them or more. trained_domains: those of the target, by their names,
    that a hospital has trained on.
    forwards_run: per batch, with logits shared by all methods.
    """

    scenario: str
    question: str
    seed: int
    classes: tuple[str, ...]
    sites: list[SiteRow]
    target: str
    target_title: str
    target_samples: NDArray[np.uint8] | None
    initialization: str
    stream: StreamFacts
    labels: list[NDArray[np.int64]]
    domains: list[NDArray[np.int64]]
    steps: list[Step] | Ledger
    methods: dict[str, RowInfo]
    forwards_run: float
    audit: list[dict[str, Any]]
    manifest: dict[str, Any]
    yaml: str
    seconds: dict[str, float] = field(default_factory=dict)
    course: tuple[Roster, ...] = ()
    novel: tuple[str, ...] = ()
    tasks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    trained_domains: tuple[str, ...] = ()
    patients: list[NDArray[np.int64]] | None = None
    disputed: Disputed | None = None

    @property
    def units(self) -> tuple[str, NDArray[np.int64], int | None]:
        """What intervals are over: its name, its number for every image (samples,), and the length of blocks that are drawn.

        Patients where two or more are known, and otherwise batches.
        """
        sizes = [len(batch) for batch in self.labels]
        patients = np.concatenate(self.patients) if self.patients else np.zeros(0, np.int64)
        if len(np.unique(patients)) > 1:
            return "patients", patients, 1
        return "batches", np.repeat(np.arange(len(sizes)), sizes), None

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Domains of the target that some hospital has trained on, and the others; nothing where all are one or the other."""
        if self.stream.conditions:
            return {}
        inside = tuple(name for name in self.stream.domain_names if name in self.trained_domains)
        outside = tuple(name for name in self.stream.domain_names if name not in inside)
        return {"in_domain": inside, "out_of_domain": outside} if inside and outside else {}

    @property
    def changes(self) -> list[Roster]:
        """The moments at which experts came or went."""
        return [one for one in self.course if one.change]

    def there(self, t: int) -> tuple[str, ...]:
        """Whose experts were there at batch t."""
        named = [one.experts for one in self.course if one.start <= t]
        return named[-1] if named else tuple(self.merged)

    def covered(self, method: str) -> NDArray[np.bool_]:
        """(T,): the batches in which the method's row was there."""
        done = np.zeros(self.stream.batches, dtype=bool)
        done[[step.t for step in self.steps_of(method)]] = True
        return done

    def covered_samples(self, method: str) -> NDArray[np.bool_]:
        """(samples,): the same for every image of the stream."""
        sizes: NDArray[np.int64] = np.array([len(batch) for batch in self.labels])
        found: NDArray[np.bool_] = np.repeat(self.covered(method), sizes)
        return found

    def coefficients(self, method: str, part: str) -> tuple[NDArray[np.float64], list[str]] | None:
        """(T', K) of the batches that the row covers, with the names of all sites and anchors; 0 for who was not there.

        None for a method that has none.
        """
        rows: list[dict[str, float]] = []
        for step in self.steps_of(method):
            given = getattr(step, part)
            if given is None:
                return None
            there = self.there(step.t)
            rows.append(dict(zip([*there, *ANCHORS[: len(given) - len(there)]], given, strict=True)))
        used = {name for row in rows for name in row}
        names = [*self.merged, *(anchor for anchor in ANCHORS if anchor in used)]
        return np.array([[row.get(name, 0.0) for name in names] for row in rows]), names

    @property
    def merged(self) -> list[str]:
        """Names of the sites whose experts reached the target, in the order of coefficients."""
        return [site.name for site in self.sites if not site.left_out]

    def steps_of(self, method: str) -> list[Step]:
        """The steps of one method in the order of the stream; their probabilities are to be had below alone."""
        if isinstance(self.steps, Ledger):
            return self.steps.steps_of(method)
        return [step for step in self.steps if step.method == method]

    def probabilities(self, method: str) -> NDArray[np.float32]:
        """Class probabilities (samples, C) of one method over the batches that its row covers."""
        if isinstance(self.steps, Ledger):
            return self.steps.probabilities(method)
        return np.concatenate([step.probabilities for step in self.steps_of(method)])
