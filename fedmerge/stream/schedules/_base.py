"""What a schedule promises; the schedules themselves are files in `stream/schedules/`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, SerializeAsAny, WithJsonSchema

from fedmerge.data.corruptions._base import Shift
from fedmerge.errors import Problem, nearest
from fedmerge.registry import Folder, Plugin

Batches = list[NDArray[np.int64]]


class Schedule(Plugin):
    """An order of the target's images. Labels and domains are read by the sampler alone.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.stream.schedules._base import Schedule
    >>> class Backwards(Schedule):
    ...     def batches(self, labels, domains, rng):
    ...         order = np.arange(len(labels))[::-1]
    ...         return [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
    >>> Backwards(batch_size=2).batches(np.zeros(3, np.int64), np.zeros(3, np.int64), np.random.default_rng(0))
    [array([2, 1]), array([0])]
    """

    batch_size: int = Field(32, ge=1, description="images per batch; the last batch may be smaller")
    max_batches: int | None = Field(None, ge=1, description="number of batches after which the stream stops; default: all images")

    def check(self, domains: tuple[str, ...]) -> list[Problem]:
        """What is wrong with this schedule for a target with these domains; cheap."""
        return []

    def conditions(self) -> tuple[Shift, ...]:
        """Shifts under each of which every image comes; none for an order of the images as they are."""
        return ()

    @abstractmethod
    def batches(self, labels: NDArray[np.int64], domains: NDArray[np.int64], rng: np.random.Generator) -> Batches:
        """Index batches into the target's images; every index at most once. labels, domains: (N,)."""


def below(key: str, problems: list[Problem]) -> list[Problem]:
    """The problems of a schedule inside another, with their keys as they stand in the file.

    Parameters
    ----------
    key : str
        Of the outer schedule under which the inner one stands.
    problems : list[Problem]
        Of the inner schedule.

    Returns
    -------
    list[Problem]
        The same, with longer keys.

    Examples
    --------
    >>> from fedmerge.errors import Problem
    >>> from fedmerge.stream.schedules._base import below
    >>> [problem.key for problem in below("within", [Problem("", "cycles", "0", "at least 1")])]
    ['within.cycles']
    """
    return [replace(problem, key=f"{key}.{problem.key}") for problem in problems]


def unconditional(key: str, inner: Schedule) -> list[Problem]:
    """Refuse a schedule of conditions inside another: it would not get the images under each of them.

    Parameters
    ----------
    key : str
        Of the outer schedule under which the inner one stands.
    inner : Schedule
        The inner schedule.

    Returns
    -------
    list[Problem]
        One problem, or none.

    Examples
    --------
    >>> from fedmerge.stream.schedules._base import SCHEDULES, unconditional
    >>> unconditional("within", SCHEDULES.load("iid")())
    []
    >>> [problem.found for problem in unconditional("within", SCHEDULES.load("corruption")())]
    ["'corruption'"]
    """
    if not inner.conditions():
        return []
    mend = f"Let '{inner.kind()}' stand outside, and this schedule within it"
    return [Problem("", key, f"'{inner.kind()}'", "a schedule of images as they are", mend)]


def cut(order: NDArray[np.int64], size: int) -> Batches:
    """Consecutive batches of an order; the last may be smaller.

    Parameters
    ----------
    order : NDArray[np.int64]
        Numbers of images (N,).
    size : int
        Images in a batch, at least 1.

    Returns
    -------
    Batches
        One array of at most `size` numbers for each batch.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.stream.schedules._base import cut
    >>> [batch.tolist() for batch in cut(np.arange(5), 2)]
    [[0, 1], [2, 3], [4]]
    """
    return [order[start : start + size] for start in range(0, len(order), size)]


def _inner(value: Any) -> Any:
    """A schedule by its name, or as a mapping with its kind; pydantic reports errors below the key."""
    if isinstance(value, Schedule):
        return value
    fields = {"kind": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("kind"), str):
        raise ValueError("a schedule is its name, or a mapping with the key 'kind'")
    if fields["kind"] not in SCHEDULES.names:
        raise ValueError(f"no such schedule: {nearest(fields['kind'], SCHEDULES.names)}")
    return SCHEDULES.load(fields["kind"]).model_validate(fields)


Within = Annotated[
    SerializeAsAny[Schedule],
    BeforeValidator(_inner),
    WithJsonSchema({"description": "a schedule by its name, or a mapping with its kind and keys"}),
]
"""A schedule inside another."""

SCHEDULES: Folder[Schedule] = Folder("fedmerge.stream.schedules", Schedule, "stream schedule")  # type: ignore[type-abstract]
