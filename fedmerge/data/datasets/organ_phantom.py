"""A procedural abdominal CT: the slice through an organ's center, cropped around it. Eleven organs as in OrganMNIST.

Classes and task follow Yang et al., MedMNIST v2, Scientific Data 2023 (OrganAMNIST, OrganCMNIST, OrganSMNIST). Everything is
drawn from the owner's name and the seed, so no patient is ever shared between two sites.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from fedmerge.data.cache import Arrays, Rows, cached_rows
from fedmerge.data.datasets import _anatomy
from fedmerge.data.datasets._base import Geometry, Source
from fedmerge.data.images import Images
from fedmerge.errors import Problem, nearest
from fedmerge.rng import generator

ORGANS = (
    "bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right",
    "liver", "lung-left", "lung-right", "pancreas", "spleen",
)  # fmt: skip
VERSION = 2
"""Raise it whenever the same fields would give other images."""

CHUNK, CHUNK_SIDE = 1000, 64
"""About so many images are rendered at a time, up to a side of so many pixels, and fewer of larger ones."""

Weight = Annotated[float, Field(ge=0, le=1000)]
Plane = Literal["axial", "coronal", "sagittal"]


class OrganPhantom(Source):
    """Left and right organs are classes of their own, so a horizontal flip never preserves the label."""

    flips: ClassVar[bool] = False

    images: int = Field(900, ge=1, le=200_000, description="number of images")
    patients: int = Field(90, ge=2, le=20_000, description="number of patients that the images show")
    planes: tuple[Plane, ...] = Field(
        ("axial", "coronal", "sagittal"), min_length=1, description="planes of the slices, which are one domain each"
    )
    priors: dict[str, Weight] = Field(
        default_factory=dict, description="relative frequency of an organ; 1 for organs that are not named"
    )
    crop: float = Field(1.7, ge=1, le=4, description="half-width of the crop, in radii of the organ")
    variation: float = Field(1.0, ge=0, le=3, description="how much patients differ; 0: not at all")

    @field_validator("priors")
    @classmethod
    def _known_organs(cls, priors: dict[str, float]) -> dict[str, float]:
        for organ in priors:
            if organ not in ORGANS:
                raise ValueError(f"no organ '{organ}': {nearest(organ, ORGANS)}")
        if len(priors) == len(ORGANS) and sum(weight > 0 for weight in priors.values()) < 2:
            raise ValueError("two organs or more need a weight above 0")
        return priors

    @field_validator("planes")
    @classmethod
    def _planes_once(cls, planes: tuple[Plane, ...]) -> tuple[Plane, ...]:
        if len(set(planes)) != len(planes):
            raise ValueError("a plane is named twice")
        return planes

    def check(self) -> list[Problem]:
        """Nothing on disk can be wrong with a phantom."""
        return []

    def classes(self) -> tuple[str, ...]:
        """The eleven organs, in alphabetical order."""
        return ORGANS

    def domains(self) -> tuple[str, ...]:
        """The planes."""
        return self.planes

    def identity(self, owner: str, seed: int) -> str:
        """A sha256 of the fields, the owner, the seed and the version of the phantom."""
        return hashlib.sha256(f"{VERSION} {owner} {seed} {self.model_dump_json()}".encode()).hexdigest()

    def holdings(self, owner: str) -> None:
        """Patients are drawn from the owner's name: sharing one is impossible."""
        return

    def load(self, geometry: Geometry, owner: str, seed: int) -> Images:
        """Images (N, size, size, channels) in Hounsfield units; gray is repeated where the model wants color."""
        rng = generator(seed, "organ_phantom", owner)
        patient = np.arange(self.images) % self.patients
        weights = np.array([self.priors.get(organ, 1.0) for organ in ORGANS])
        labels = rng.choice(len(ORGANS), self.images, p=weights / weights.sum())
        domains = rng.permutation(np.arange(self.images) % len(self.planes))
        key = f"{self.identity(owner, seed)}-{geometry.size}"
        shape = (self.images, geometry.size, geometry.size)

        def render(rows: Rows) -> Arrays:
            rows.begin(shape, np.int16)
            return self._render(patient, labels, domains, rows, geometry.size, rng)

        rendered = cached_rows(owner, key, render)
        # Without a copy of the gray for each channel
        pixels = np.broadcast_to(rendered["pixels"][..., None], (*shape, geometry.channels))
        return Images(pixels, labels.astype(np.int64), domains, patient, ORGANS, self.planes, flips=False)

    def _render(
        self, patient: np.ndarray, labels: np.ndarray, domains: np.ndarray, rows: Rows, size: int, rng: np.random.Generator
    ) -> Arrays:
        """The slice of `planes[domains[i]]` through about the center of organ `labels[i]` of patient `patient[i]`."""
        torsos = _anatomy.draw_anatomies(self.patients, self.variation, rng)
        organ = np.array([_anatomy.NAMES.index(name) for name in ORGANS])[labels]
        planes = np.array([_anatomy.PLANES[name] for name in self.planes], np.float32)[domains]  # (N, 2, 3)
        axes = torsos.axes[patient, organ]  # (N, 3)
        in_plane = np.abs(planes).sum(1)
        radius = (axes * in_plane).max(-1)
        jitter = rng.uniform(-1, 1, (self.images, 3)).astype(np.float32)
        off_plane, in_slice = 0.25 * axes * (1 - in_plane), 0.12 * radius[:, None] * in_plane
        origins = torsos.centers[patient, organ] + self.variation * jitter * (off_plane + in_slice)
        half_widths = self.crop * radius * np.exp(0.08 * self.variation * rng.standard_normal(self.images))
        together = CHUNK if size <= CHUNK_SIDE else max(1, CHUNK * CHUNK_SIDE**2 // size**2)
        for part in np.array_split(np.arange(self.images), max(1, self.images // together)):
            made = _anatomy.slices(
                _anatomy.Anatomies(*(getattr(torsos, name)[patient[part]] for name in _anatomy.FIELDS)),
                origins[part].astype(np.float32),
                planes[part],
                half_widths[part].astype(np.float32),
                size,
            )
            rows.put(int(part[0]), made)
        return {}
