"""Each image under every shift of some families at some severities: how does accuracy fall?"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from fedmerge.data.corruptions._base import SEVERITIES, SHIFTS, Modality, Shift, Strength, published_for
from fedmerge.errors import DataError, Problem, nearest
from fedmerge.stream.schedules._base import Batches, Schedule, Within, below, unconditional


def _once(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) < len(values):
        raise ValueError("each value once")
    return values


def _families(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in SHIFTS.names:
            raise ValueError(f"no such shift: {nearest(name, SHIFTS.names)}")
    if len(set(names)) < len(names):
        raise ValueError("each family once")
    return names


class Corruption(Schedule):
    """Each image once per family and severity (Hendrycks & Dietterich, ICLR 2019); the conditions stand in place of domains.

    `within` orders them: `domain_seq` one after another, `iid` all mixed, `mixture_drift` with `gradual_severity` up and down.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.stream.schedules.corruption import Corruption
    >>> schedule = Corruption(families=("noise",), severities=(1, 5), batch_size=4)
    >>> [shift.name for shift in schedule.conditions()]
    ['noise 1', 'noise 5']
    >>> labels, domains = np.tile([0, 1, 0, 1], 2), np.repeat([0, 1], 4)  # four images, under two conditions
    >>> [batch.tolist() for batch in schedule.batches(labels, domains, np.random.default_rng(0))]
    [[3, 2, 1, 0], [5, 7, 4, 6]]
    """

    families: Literal["published"] | Annotated[tuple[str, ...], AfterValidator(_families), Field(min_length=1)] = Field(
        ("noise", "pixelate"),
        description="names of files in data/corruptions/; published: all families with published constants for the modality",
    )
    severities: Annotated[tuple[Annotated[int, Field(ge=1, le=5)], ...], AfterValidator(_once)] = Field(
        SEVERITIES, min_length=1, description="severities of each family, from 1 to 5"
    )
    strength: Strength = Field(
        "published", description="source of the severities' constants: published ones if there are any, or our own"
    )
    modality: Modality | None = Field(
        None, description="modality of the published constants, if a family has some for it; default: ImageNet-C's"
    )
    images: int | None = Field(
        None, ge=1, description="number of the target's images that are used, drawn once for all conditions; default: all"
    )
    within: Within = Field("domain_seq", validate_default=True, description="schedule of the conditions, in place of domains")

    def check(self, domains: tuple[str, ...]) -> list[Problem]:
        """What is wrong with the inner schedule, to which conditions are domains."""
        names = tuple(shift.name for shift in self.conditions())
        return [*unconditional("within", self.within), *below("within", self.within.check(names))]

    def conditions(self) -> tuple[Shift, ...]:
        """Family by family, severities in their order."""
        given = {"strength": self.strength, "modality": self.modality}
        families = published_for(self.modality or "photograph") if self.families == "published" else self.families
        return tuple(SHIFTS.load(family)(severity=one, **given) for family in families for one in self.severities)

    def batches(self, labels: NDArray[np.int64], domains: NDArray[np.int64], rng: np.random.Generator) -> Batches:
        """labels, domains: (conditions * N,), by condition. Raises DataError if it lacks as many images as are asked for."""
        count = len(labels) // len(self.conditions())
        if self.images is not None and self.images > count:
            found = f"stream.images: found {self.images}; expected at most"
            raise DataError(f"{found} {count}, all that the target has", f"{found} as many as the target has")
        chosen = np.sort(rng.permutation(count)[: self.images])
        used = np.flatnonzero(np.isin(np.arange(len(labels)) % count, chosen))
        inner = self.within.model_copy(update={"batch_size": self.batch_size})
        return [used[batch] for batch in inner.batches(labels[used], domains[used], rng)]
