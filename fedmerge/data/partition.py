"""Index arithmetic: who gets which images, and which are held out."""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fedmerge.folder import Spec
from fedmerge.seeds import generator

Index = NDArray[np.int64]


def holdout(labels: Index, groups: Index, share: float, rng: np.random.Generator) -> tuple[Index, Index]:
    """Split indices (N,) into training and held-out; a group is never split, and classes keep their shares.

    Groups are drawn in random order, and each goes to the side that lacks its classes most. Both sides are sorted.
    Raises ValueError if there are fewer than two groups.
    """
    names, member = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise ValueError("one group of images cannot be split in two")
    counts = np.zeros((len(names), int(labels.max()) + 1))
    np.add.at(counts, (member, labels), 1)
    wanted = share * counts.sum(0)
    got = np.zeros_like(wanted)
    held = np.zeros(len(names), bool)
    for group in rng.permutation(len(names)):
        missing = wanted - got
        held[group] = (counts[group] * missing).sum() > 0 and (counts[group] * (missing - counts[group] / 2)).sum() > 0
        got += counts[group] * held[group]
    if not held.any() or held.all():
        held[:] = False
        held[rng.integers(len(names))] = True
    return np.flatnonzero(~held[member]), np.flatnonzero(held[member])


class Split(Spec):
    """One part of images that several hospitals share out among them. Parts are disjoint and cover everything.

    label_skew: per class, Dir(alpha) over the parts. quantity_skew: Dir(alpha) over the parts for all classes alike.
    quantity: the given shares, class by class. Sites that name the same seed and sizes hold parts of one and the same split.
    """

    by: Literal["label_skew", "quantity_skew", "quantity"] = Field(description="what differs between the parts")
    parts: int = Field(2, ge=2, le=1000, description="number of parts")
    part: int = Field(ge=0, description="the part that this site holds, from 0")
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; small is very different")
    shares: tuple[float, ...] = Field((), description="for quantity: one positive share for each part")
    seed: int = Field(0, ge=0, description="the same for all sites of one split")

    @model_validator(mode="after")
    def _parts_exist(self) -> Self:
        if self.part >= self.parts:
            raise ValueError(f"part {self.part} of {self.parts} parts: they count from 0")
        if self.by == "quantity" and (len(self.shares) != self.parts or min(self.shares) <= 0):
            raise ValueError(f"quantity needs {self.parts} positive shares, one for each part")
        return self

    def indices(self, labels: Index, name: str) -> Index:
        """Sorted indices of this part of the images of one domain. labels: (N,); name: the domain's name."""
        rng = generator(self.seed, "split", name, self.by, self.parts)
        shares = np.array(self.shares or rng.dirichlet([self.alpha] * self.parts))
        mine: list[Index] = []
        for label in np.unique(labels):
            if self.by == "label_skew":
                shares = rng.dirichlet([self.alpha] * self.parts)
            members = rng.permutation(np.flatnonzero(labels == label))
            cuts = np.rint(np.cumsum(shares / shares.sum())[:-1] * len(members)).astype(int)
            mine.append(np.split(members, cuts)[self.part])
        return np.sort(np.concatenate(mine)).astype(np.int64)
