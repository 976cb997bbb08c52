"""Index arithmetic: who gets which images, and which are held out."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fedmerge.data.images import Images
from fedmerge.errors import DataError
from fedmerge.registry import Spec
from fedmerge.rng import generator

Index = NDArray[np.int64]
Share = Annotated[float, Field(gt=0, le=1e6)]


def holdout(labels: Index, groups: Index, share: float, rng: np.random.Generator) -> tuple[Index, Index]:
    """Split indices (N,) into training and held-out; a group is never split, and classes keep their shares.

    Groups are drawn in random order, and each is held out if that brings the held-out counts of its classes closer to `share`.
    Then groups change sides while that puts a class on a side that lacks it. Both index arrays are sorted and not empty.
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
        # The squared distance to the wanted counts falls by twice this.
        held[group] = (counts[group] * (wanted - got - counts[group] / 2)).sum() > 0
        got += counts[group] * held[group]
    if not held.any() or held.all():
        held[:] = False
        held[rng.integers(len(names))] = True
    _complete(held, counts, wanted)
    return np.flatnonzero(~held[member]), np.flatnonzero(held[member])


def _complete(held: NDArray[np.bool_], counts: NDArray[np.float64], wanted: NDArray[np.float64]) -> None:
    """Move single groups in `held` (G,), in place, while a side then lacks fewer of the classes that two groups or more have."""
    has = counts > 0  # (G, C)
    owners = has.sum(0)
    while True:
        inside = has[held].sum(0)  # groups of every class that are held out
        after = np.where(held[:, None], inside - has, inside + has)
        lacking = ((after == 0) | (after == owners))[:, owners > 1].sum(1)
        now = ((inside == 0) | (inside == owners))[owners > 1].sum()
        size = np.where(held, held.sum() - 1, held.sum() + 1)
        lacking[(size == 0) | (size == len(held))] = len(owners) + 1
        if lacking.min() >= now:
            return
        best = np.flatnonzero(lacking == lacking.min())
        change = np.where(held[best, None], -counts[best], counts[best])
        off = np.square(counts[held].sum(0) + change - wanted).sum(1)
        held[best[off.argmin()]] ^= True


class Split(Spec):
    """One part of images that several hospitals share out among them. Parts are disjoint and cover everything.

    label_skew: per class, Dir(alpha) over the parts (Hsu, Qi & Brown, 2019, arXiv:1909.06335). quantity_skew: Dir(alpha) over
    the parts for all classes alike. quantity: the given shares, class by class. Every domain is split by itself, so that sites
    which name the same seed, parts, alpha and shares hold parts of one and the same split, whichever domains they take.
    """

    by: Literal["label_skew", "quantity_skew", "quantity"] = Field(description="in what the parts differ")
    parts: int = Field(2, ge=2, le=1000, description="number of parts")
    part: int = Field(ge=0, description="number of the part that this site holds, from 0")
    alpha: float = Field(0.5, ge=0.01, le=1e6, description="Dirichlet concentration; parts differ more if it is small")
    shares: tuple[Share, ...] = Field((), description="for quantity: one positive share for each part")
    seed: int = Field(0, ge=0, description="seed of the split, the same for all its sites")

    @model_validator(mode="after")
    def _parts_exist(self) -> Self:
        if self.part >= self.parts:
            raise ValueError(f"part {self.part} of {self.parts} parts: they count from 0")
        if self.by == "quantity" and len(self.shares) != self.parts:
            raise ValueError(f"{len(self.shares)} shares for {self.parts} parts: 'quantity' needs one share for each part")
        if self.by != "quantity" and self.shares:
            raise ValueError(f"shares are for 'quantity'; '{self.by}' draws them from Dir(alpha)")
        return self

    def indices(self, labels: Index, name: str, groups: Index | None = None) -> Index:
        """Sorted indices of this part of the images of one domain. labels: (N,); name: the domain's name.

        groups: (N,) patients, whose images go together, each with the label that most of them have.
        """
        if groups is not None:
            _, member = np.unique(groups, return_inverse=True)
            counts = np.zeros((member.max() + 1, int(labels.max()) + 1))
            np.add.at(counts, (member, labels), 1)
            return np.flatnonzero(np.isin(member, self.indices(counts.argmax(1), name)))
        rng = generator(self.seed, "split", name, self.by, self.parts)
        shares = np.array(self.shares or rng.dirichlet([self.alpha] * self.parts))
        mine: list[Index] = [np.empty(0, np.int64)]
        for label in np.unique(labels):
            if self.by == "label_skew":
                shares = rng.dirichlet([self.alpha] * self.parts)
            members = rng.permutation(np.flatnonzero(labels == label))
            cuts = np.rint(np.cumsum(shares / shares.sum())[:-1] * len(members)).astype(int)
            mine.append(np.split(members, cuts)[self.part])
        return np.sort(np.concatenate(mine)).astype(np.int64)


def own_split(images: Images, owner: str, share: float, seed: int) -> tuple[Index, Index]:
    """Indices of an owner's training and validation images, as `holdout`. Raises DataError if there are too few groups."""
    try:
        return holdout(images.labels, images.groups, share, generator(seed, "holdout", owner))
    except ValueError as error:
        told = f"{error}; expected two patients or more"
        raise DataError(f"site '{owner}': {told}", told) from None
