"""How long a target's stream is: counted where the images are, and nothing but the count comes back."""

from __future__ import annotations

from fedmerge.data.corruption import Gallery
from fedmerge.data.source import Geometry
from fedmerge.experts.lifeline import owners
from fedmerge.site import Site
from fedmerge.stream.schedule import Schedule
from fedmerge.stream.stream import Stream


def count_batches(site: Site, geometry: Geometry, schedule: Schedule, seed: int) -> int:
    """Batches of the stream, counted in a process that is gone afterwards. Raises DataError if the images cannot be used."""
    with owners(1) as owner:
        return owner.submit(_count, site, geometry, schedule, seed).result()


def _count(site: Site, geometry: Geometry, schedule: Schedule, seed: int) -> int:
    loaded = site.source.load(geometry, site.name, seed)
    return len(Stream(Gallery(loaded, schedule.conditions(), site.name, seed), schedule, site.name, seed))
