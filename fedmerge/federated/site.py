"""What `sites/*.yaml` may say: one hospital."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from fedmerge.data.cache import SMALL, changed, key_of
from fedmerge.data.corruptions._base import SHIFTS
from fedmerge.data.datasets._base import SOURCES, Geometry
from fedmerge.data.images import Images
from fedmerge.data.scanner import Scanner
from fedmerge.federated.attacks._base import ATTACKS, Attack
from fedmerge.registry import Spec, as_written, by_name
from fedmerge.system.files import at_home, settled_digest

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


def _in_their_order(value: Any) -> Any:
    """A mapping from the file's names to the scenario's stands for the latter, in its order."""
    return list(value.values()) if isinstance(value, dict) else value


class OwnExpert(Spec):
    """An expert that a hospital brings. It trains none then, and its images only validate, calibrate and measure."""

    checkpoint: str = Field(
        "", description="file with the expert's weights, safetensors or .pth of PyTorch; may name environment variables as ${NAME}"
    )
    classes: Annotated[tuple[str | None, ...] | None, BeforeValidator(_in_their_order)] = Field(
        None,
        description="class of each output of the file's head, in its order: a list of the scenario's classes, or a "
        "mapping from the file's classes to these; null for an output that is not used. Default: the "
        "scenario's classes in their order",
    )
    sha256: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="digest of a file that only the hospital has; `fedmerge outline` writes it",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> OwnExpert:
        if bool(self.checkpoint) == bool(self.sha256):
            raise ValueError("expected 'checkpoint: FILE', or 'sha256' where the file is at the hospital alone, and not both")
        return self

    @property
    def file(self) -> Path:
        """Where its weights are."""
        return at_home(self.checkpoint)

    def found_anywhere(self) -> OwnExpert:
        """The same for a process with another working folder."""
        return self.model_copy(update={"checkpoint": str(self.file.absolute())}) if self.checkpoint else self

    @property
    def digest(self) -> str:
        """A sha256 of the file, or nothing if it cannot be read."""
        return self.sha256 or settled_digest(self.file)


class Site(Spec):
    """One hospital: where its images come from, which scanner takes them, and what it agrees to show."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$", description="unique name, by which scenarios refer to the site")
    title: str = Field("", description="description of the site, in one line for the report")
    public_key: Annotated[str | None, AfterValidator(_is_key)] = Field(
        None,
        description="Ed25519 key, base64 or hex, that verifies the signatures of the site's uploads; `fedmerge keys` writes it",
    )
    source: AnySource = Field(description="source of the images")
    scanner: Scanner = Field(default_factory=Scanner, description="what the hospital's scanner does to every image")
    shifts: Annotated[tuple[AnyShift, ...], PlainSerializer(as_written)] = Field(
        (), description="further changes to every image, in this order: a name in data/corruptions/, or {name: {severity: 3}}"
    )
    attack: Annotated[AnyAttack | None, PlainSerializer(_written)] = Field(
        None, description="makes this hospital a simulated attacker: a name in attacks/, or {name: {fields}}"
    )
    expert: OwnExpert | None = Field(
        None, description="weights that the hospital has trained elsewhere; it does not train in a run"
    )
    validation: float = Field(
        0.2, gt=0, lt=1, description="share of the groups (patients) held out for model selection and calibration"
    )
    prevalences: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="of a target: share or number of images of each class, for `priors: declared` of a scenario"
    )
    samples: int = Field(0, ge=0, le=12, description="number of images that the hospital allows in the report; audited")
    disagreements: int = Field(
        0,
        ge=0,
        le=24,
        description="of a target: number of images on which methods disagree that it allows in the report, with "
        "their true class and every method's prediction; audited",
    )

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
