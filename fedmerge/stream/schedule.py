"""What a schedule promises; the schedules themselves are files in `stream/schedules/`."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmerge.errors import Problem
from fedmerge.folder import Folder, Plugin

Batches = list[NDArray[np.int64]]


class Schedule(Plugin):
    """An order of the target's images. Labels and domains are read by the sampler alone."""

    batch_size: int = Field(32, ge=1, description="images per batch; the last batch may be smaller")
    max_batches: int | None = Field(None, ge=1, description="stop the stream after so many batches")

    def check(self, domains: tuple[str, ...]) -> list[Problem]:
        """What is wrong with this schedule for a target with these domains; cheap."""
        return []

    @abstractmethod
    def batches(self, labels: NDArray[np.int64], domains: NDArray[np.int64], rng: np.random.Generator) -> Batches:
        """Index batches into the target's images; every index at most once. labels, domains: (N,)."""


def cut(order: NDArray[np.int64], size: int) -> Batches:
    """Consecutive batches of `order`; the last may be smaller."""
    return [order[start : start + size] for start in range(0, len(order), size)]


SCHEDULES: Folder[Schedule] = Folder("fedmerge.stream.schedules", Schedule, "stream schedule")  # type: ignore[type-abstract]
