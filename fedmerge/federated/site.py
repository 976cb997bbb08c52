"""What `sites/*.yaml` may say: one hospital."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, PlainSerializer

from fedmerge.data.cache import SMALL, changed, key_of
from fedmerge.data.corruptions._base import SHIFTS
from fedmerge.data.datasets._base import SOURCES, Geometry
from fedmerge.data.images import Images
from fedmerge.data.scanner import Scanner
from fedmerge.federated.attacks._base import ATTACKS, Attack
from fedmerge.registry import Spec, as_written, by_name

VERSION = 1
"""Raise it whenever a scanner or a shift would show the same images otherwise."""

AnySource: Any = SOURCES.union()
AnyShift: Any = by_name(SHIFTS)
AnyAttack: Any = by_name(ATTACKS)


def _written(attack: Attack | None) -> Any:
    return as_written([attack])[0] if attack else None


def public_bytes(key: str) -> bytes:
    """The 32 bytes of a public key that is written as base64 or hex. Raises ValueError."""
    try:
        raw = bytes.fromhex(key) if len(key) == 64 else base64.b64decode(key, validate=True)
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise ValueError("expected an Ed25519 public key: 32 bytes as base64 or hex. Make one with 'fedmerge keys SITE_FILE'")
    return raw


def _is_key(key: str | None) -> str | None:
    if key is not None:
        public_bytes(key)
    return key


class Site(Spec):
    """One hospital: where its images come from, which scanner takes them, and what it agrees to show."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$", description="unique name, as scenarios call it")
    title: str = Field("", description="one line for the report")
    public_key: Annotated[str | None, AfterValidator(_is_key)] = Field(
        None, description="Ed25519 key, base64 or hex, that its uploads must be signed for; `fedmerge keys` writes it"
    )
    source: AnySource = Field(description="where the images come from")
    scanner: Scanner = Field(default_factory=Scanner, description="what the hospital's scanner does to every image")
    shifts: Annotated[tuple[AnyShift, ...], PlainSerializer(as_written)] = Field(
        (), description="what else befalls every image, in this order: names in data/corruptions/, or with a severity below"
    )
    attack: Annotated[AnyAttack | None, PlainSerializer(_written)] = Field(
        None, description="makes this hospital a simulated attacker: a name in attacks/, or with fields below"
    )
    validation: float = Field(0.2, gt=0, lt=1, description="share of the groups (patients) held out to select and calibrate")
    samples: int = Field(0, ge=0, le=12, description="images that the hospital agrees to show in the report; audited")

    def images(self, geometry: Geometry, seed: int) -> Images:
        """The hospital's images as a model sees them: loaded, scanned, shifted. Raises DataError if they cannot be used."""
        images: Images = self.source.load(geometry, self.name, seed)
        if not self.shifts and not self.scanner.changes(images):
            return images
        shown, key = self.scanner.begin(images, self.name, seed), ""

        def change(pixels: NDArray[Any], places: NDArray[np.int64]) -> NDArray[np.uint8]:
            found = shown(pixels)
            for shift in self.shifts:
                found = shift.shifted(found, places, self.name, seed)
            return found

        if images.pixels.size > SMALL:
            fields = self.model_dump(mode="json", include={"scanner", "shifts"})
            key = key_of("changed", VERSION, self.source.identity(self.name, seed), geometry, fields, seed)
        return replace(images, pixels=changed(self.name, key, images.pixels, change))
