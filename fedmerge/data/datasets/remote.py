"""Images that stay at their hospital: what a coordinator may know of them, and no path. `fedmerge outline` writes it."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedmerge.data.datasets._base import Geometry, Pseudonyms, Source, same_names
from fedmerge.data.images import Images
from fedmerge.errors import DataError, Problem


class Remote(Source):
    """For a hospital that trains in a process of its own, with a site file of its own: see docs/deployment.md."""

    aliases: ClassVar[tuple[str, ...]] = ("elsewhere",)

    labels: tuple[str, ...] = Field(min_length=2, description="names of the classes, in label order")
    parts: tuple[str, ...] = Field(min_length=1, description="names of the domains, in domain order")
    sha256: str = Field(
        pattern=r"^[0-9a-f]{64}$", description="digest of everything that determines the images, sent by the hospital"
    )
    patient_key: str = Field("", description="digest of the secret from which the patients' digests are made, sent by the hospital")
    patients: tuple[str, ...] = Field((), description="a digest of each patient, made at the hospital with that secret")
    flips: bool = Field(False, description="whether a horizontal flip preserves the label")

    def check(self) -> list[Problem]:
        """Names that a person would take for one; more cannot be seen from here."""
        mend = "Ask the hospital to rename its folders, and for a new outline"
        labels, parts = ({name: name for name in names} for names in (self.labels, self.parts))
        return same_names("labels", "class", labels, mend) + same_names("parts", "domain", parts, mend)

    def classes(self) -> tuple[str, ...]:
        """As the hospital tells."""
        return self.labels

    def domains(self) -> tuple[str, ...]:
        """As the hospital tells."""
        return self.parts

    def identity(self, owner: str, seed: int) -> str:
        """As the hospital tells: that of its own source, so that the experts of both site files are the same."""
        return self.sha256

    def holdings(self, owner: str) -> None:
        """Nobody but the hospital knows."""
        return

    @property
    def knows_patients(self) -> bool:
        """Whether the hospital tells digests of them."""
        return bool(self.patient_key)

    def pseudonyms(self) -> Pseudonyms | None:
        """As the hospital tells."""
        return Pseudonyms(self.patient_key, frozenset(self.patients)) if self.patient_key else None

    def load(self, geometry: Geometry, owner: str, seed: int) -> Images:
        """Raises DataError: the images are not here."""
        told = "source: found 'remote'; expected images: only the hospital itself can train, where its own site file is"
        raise DataError(f"site '{owner}': {told} (docs/deployment.md)", told)
