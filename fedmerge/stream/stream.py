"""The target's stream: seeded index batches, their digest, and the labels, sealed until the report."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedmerge.errors import DataError
from fedmerge.rng import generator
from fedmerge.stream.schedules._base import Batches, Schedule


@dataclass(frozen=True)
class Answers:
    """Labels and domains of every batch in order, as the report needs them.

    Attributes
    ----------
    labels : list[NDArray[np.int64]]
        (n_t,) of each batch t, from 0.
    domains : list[NDArray[np.int64]]
        (n_t,) of each batch t, from 0.
    patients : list[NDArray[np.int64]], optional
        A number for the patient of each image, from 0 as they first appear, which tells nothing else; None if not known.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.stream.stream import Answers
    >>> answers = Answers(labels=[np.array([0, 1]), np.array([1])], domains=[np.array([0, 0]), np.array([1])])
    >>> np.concatenate(answers.labels).tolist(), answers.patients is None
    ([0, 1, 1], True)
    """

    labels: list[NDArray[np.int64]]
    domains: list[NDArray[np.int64]]
    patients: list[NDArray[np.int64]] | None = None


class Labeled(Protocol):
    """What the sampler sees of the target's images: labels and domains (N,)."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,), from 0."""

    @property
    def domains(self) -> NDArray[np.int64]:
        """(N,), from 0."""

    @property
    def domain_names(self) -> tuple[str, ...]:
        """In domain order."""


class Stream:
    """Index batches into the target's images. Labels are read by the sampler and the answer sheet, and by nobody else.

    Parameters
    ----------
    images : Labeled
        Labels and domains (N,) of the target's images.
    schedule : Schedule
        The order.
    owner : str
        Name of the target, by which its random numbers differ from others'.
    seed : int
        Of the order.

    Raises
    ------
    DataError
        If the schedule makes no batch of these images.

    Examples
    --------
    >>> import numpy as np
    >>> from types import SimpleNamespace
    >>> from fedmerge.stream.schedules._base import SCHEDULES
    >>> from fedmerge.stream.stream import Stream
    >>> domains = np.repeat([0, 1], 6)
    >>> images = SimpleNamespace(labels=np.tile([0, 1], 6), domains=domains, domain_names=("axial", "coronal"))
    >>> stream = Stream(images, SCHEDULES.load("domain_seq")(batch_size=4), owner="mercy", seed=0)
    >>> len(stream), stream.truth.tolist()
    (4, [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> labels, _ = stream.truth_of(0)
    >>> stream.mark(0, np.eye(2, dtype=np.float32)[labels])  # all four are right
    4
    """

    def __init__(self, images: Labeled, schedule: Schedule, owner: str, seed: int) -> None:
        rng = generator(seed, "stream", owner, schedule.kind())
        batches = schedule.batches(images.labels, images.domains, rng)[: schedule.max_batches]
        if not batches:
            raise DataError(
                f"target '{owner}': found {len(images.labels)} images, from which '{schedule.kind()}' makes no batch of "
                f"{schedule.batch_size}; expected more images of every domain, or a smaller stream.batch_size",
                f"stream: '{schedule.kind()}' makes no batch of {schedule.batch_size} from the target's images; "
                "expected more of every domain, or a smaller stream.batch_size",
            )
        self.batches: Batches = [batch.astype(np.int64) for batch in batches]
        self.samples = sum(len(batch) for batch in self.batches)
        self.unused = len(images.labels) - self.samples
        self._labels, self._domains = images.labels, images.domains
        self._domain_count = len(images.domain_names)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def index_sha256(self) -> str:
        """Digest of all index batches, the same on every machine: lengths and indices as little-endian 64-bit integers."""
        digest = hashlib.sha256()
        for batch in self.batches:
            digest.update(np.array([len(batch)], "<i8").tobytes() + batch.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def truth(self) -> NDArray[np.float64]:
        """The true share of every domain in every batch (T, D)."""
        return np.stack([np.bincount(self._domains[b], minlength=self._domain_count) / len(b) for b in self.batches])

    def mark(self, t: int, probabilities: NDArray[np.float32]) -> int:
        """How many predictions (n_t, C) for batch t are right."""
        return int((probabilities.argmax(-1) == self._labels[self.batches[t]]).sum())

    def truth_of(self, t: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Labels and domains (n_t,) of batch t: for oracles, which are never ranked."""
        return self._labels[self.batches[t]], self._domains[self.batches[t]]

    def answers(self) -> Answers:
        """The sealed labels, opened: for the report alone, when the stream is over."""
        return Answers([self._labels[b] for b in self.batches], [self._domains[b] for b in self.batches])
