"""What a site holds, in numbers: counted where the images are, and nothing but counts comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedmerge.data.datasets._base import Geometry
from fedmerge.data.partition import own_split
from fedmerge.federated.site import Site


@dataclass(frozen=True)
class Census:
    """Images of one site. groups: its patients, or None where they are not known. train, validation: images of each part; 0 where
    the site is the target.

    per_class, per_domain: images by name.
    """

    site: str
    images: int
    groups: int | None
    train: int
    validation: int
    per_class: dict[str, int]
    per_domain: dict[str, int]


def census(site: Site, geometry: Geometry, seed: int, trains: bool = True, only: Sequence[str] = ()) -> Census:
    """Count one site's images, split as it would split them. only: classes that count, if not all.

    Raises DataError if they cannot be used.
    """
    images = site.source.load(geometry, site.name, seed)
    images = images.of_classes(only) if only else images
    train, held = 0, 0
    if trains:
        train, held = (len(part) for part in own_split(images, site.name, site.validation, seed))
    classes = np.bincount(images.labels, minlength=len(images.classes)).tolist()
    domains = np.bincount(images.domains, minlength=len(images.domain_names)).tolist()
    return Census(
        site.name,
        len(images),
        len(np.unique(images.groups)) if site.source.knows_patients else None,
        train,
        held,
        dict(zip(images.classes, classes, strict=True)),
        dict(zip(images.domain_names, domains, strict=True)),
    )
