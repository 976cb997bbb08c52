"""A procedural abdomen: ellipsoids with organs' places, sizes and Hounsfield values, and the slice of a plane through them.

Coordinates in mm from the middle of the torso: x to the patient's left, y to the back, z to the head. A slice through ellipsoids is
a quadratic form in the two coordinates of the plane, so all slices of all images are one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Array = NDArray[np.float32]


class Solid(NamedTuple):
    """Center and semi-axes in mm, mean and patient-to-patient deviation of the Hounsfield value, and how it varies."""

    center: tuple[float, float, float]
    axes: tuple[float, float, float]
    hounsfield: float
    spread: float = 8.0
    drift: float = 6.0  # deviation of the center, mm
    tilt: float = 8.0  # deviation of the tilt about each axis, degrees
    size: float = 0.10  # deviation of the logarithm of the size


FAR = 2000.0  # a semi-axis this long makes a cylinder

# Painted in this order: a later solid covers an earlier one. Right organs have negative x. What tells left from right even in a
# sagittal slice is what tells it in a patient: the liver over the right kidney, which lies lower; stomach and spleen over the
# left one; the heart at the left lung; the sigmoid colon with its gas before the left femoral head, the caecum on the right.
SOLIDS: dict[str, Solid] = {
    "fat": Solid((0, 0, 0), (178, 122, FAR), -95, 8, 2, 1, 0.04),
    "wall": Solid((0, 2, 0), (160, 105, FAR), 50, 6, 2, 1, 0.03),
    "cavity": Solid((0, -4, 0), (145, 90, FAR), -30, 15, 2, 1, 0.03),
    "lung-right": Solid((-72, 4, 200), (62, 76, 115), -820, 30, 6, 5),
    "lung-left": Solid((74, 8, 208), (52, 72, 108), -820, 30, 6, 5),
    "heart": Solid((26, -32, 150), (50, 46, 50), 130, 20),
    "ilium-right": Solid((-100, 15, -170), (14, 48, 50), 380, 40, 4),
    "ilium-left": Solid((100, 15, -170), (14, 48, 50), 380, 40, 4),
    "stomach": Solid((62, -42, 52), (42, 36, 44), 15, 12, 8, 12, 0.15),
    "gastric-air": Solid((62, -62, 58), (24, 12, 26), -850, 30, 8),
    "liver": Solid((-68, -18, 55), (82, 74, 66), 110, 10),
    "spleen": Solid((104, 38, 58), (27, 38, 50), 125, 10),
    "kidney-right": Solid((-60, 50, -42), (28, 26, 54), 180, 15),
    "kidney-left": Solid((60, 50, -20), (28, 26, 54), 180, 15),
    "pancreas": Solid((14, 2, 4), (62, 15, 15), 95, 10, 6, 10),
    "caecum": Solid((-88, -25, -130), (30, 32, 46), 40, 20, 6),
    "sigmoid": Solid((88, -32, -206), (28, 25, 42), -420, 120, 5),
    "bladder": Solid((0, -32, -228), (40, 36, 34), 5, 6, 6, 8, 0.15),
    "shaft-right": Solid((-122, 10, -292), (15, 15, 48), 380, 40, 4),
    "shaft-left": Solid((122, 10, -292), (15, 15, 48), 380, 40, 4),
    "femur-right": Solid((-94, 8, -248), (26, 26, 26), 420, 40, 5),
    "femur-left": Solid((94, 8, -248), (26, 26, 26), 420, 40, 5),
    "spine": Solid((0, 72, 0), (21, 21, FAR), 320, 40, 2, 2, 0.06),
    "canal": Solid((0, 96, 0), (9, 8, FAR), 20, 5, 2, 2, 0.06),
}
NAMES = tuple(SOLIDS)
AIR = -1000.0

# Axes of the image (to the right, downwards) in the patient's coordinates, as radiologists look at it: right is on the left.
PLANES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
}


@dataclass(frozen=True)
class Anatomies:
    """Torsos of n patients with S solids: centers (n, S, 3) mm, frames (n, S, 3, 3), hounsfield (n, S), axes (n, S, 3) mm.

    A frame maps a displacement in mm to the solid's own coordinates, where its surface is the unit sphere.
    """

    centers: Array
    frames: Array
    hounsfield: Array
    axes: Array


FIELDS = ("centers", "frames", "hounsfield", "axes")


def draw_anatomies(patients: int, variation: float, rng: np.random.Generator) -> Anatomies:
    """Random patients. variation scales every deviation from the mean anatomy; 0 makes all patients the same."""
    solids = list(SOLIDS.values())
    count = (patients, len(solids))

    def column(values: list[float]) -> NDArray[np.float64]:
        return variation * np.array(values)[None, :, None]

    stature = np.exp(0.06 * variation * rng.standard_normal((patients, 1, 3)))
    centers = np.array([solid.center for solid in solids]) * stature
    centers = centers + column([solid.drift for solid in solids]) * rng.standard_normal((*count, 3))
    sizes = np.exp(column([solid.size for solid in solids]) * rng.standard_normal((*count, 3)))
    axes = np.array([solid.axes for solid in solids]) * stature * sizes
    tilts = column([solid.tilt for solid in solids]) * rng.standard_normal((*count, 3))
    turned = Rotation.from_euler("xyz", tilts.reshape(-1, 3), degrees=True).as_matrix().reshape(*count, 3, 3)
    spreads = variation * np.array([solid.spread for solid in solids])
    hounsfield = np.array([solid.hounsfield for solid in solids]) + spreads * rng.standard_normal(count)
    frames = turned / axes[..., None]
    return Anatomies(*(item.astype(np.float32) for item in (centers, frames, hounsfield, axes)))


def slices(anatomies: Anatomies, origins: Array, planes: Array, half_widths: Array, size: int) -> NDArray[np.int16]:
    """Render one slice for each anatomy. origins: (n, 3) mm; planes: (n, 2, 3) unit vectors; half_widths: (n,) mm.

    Returns (n, size, size) Hounsfield units. Edges are soft over about a pixel, as partial volumes are.
    """
    offset = np.einsum("nsij,nsj->nsi", anatomies.frames, origins[:, None] - anatomies.centers)  # (n, S, 3)
    span = np.einsum("nsij,npj->nspi", anatomies.frames, planes * half_widths[:, None, None])  # (n, S, 2, 3)
    a, b = span[:, :, 0], span[:, :, 1]
    terms = [(offset, offset, 1), (offset, a, 2), (offset, b, 2), (a, a, 1), (a, b, 2), (b, b, 1)]
    quadratic = np.stack([scale * (left * right).sum(-1) for left, right, scale in terms], -1)  # (n, S, 6)
    ticks = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    v, u = np.meshgrid(ticks, ticks, indexing="ij")
    monomials = np.stack([np.ones_like(u), u, v, u * u, u * v, v * v]).reshape(6, -1)  # (6, H W)
    image = np.full((len(origins), size * size), AIR, np.float32)
    pixel = 2 * half_widths / size
    for solid in range(len(NAMES)):
        radius = np.sqrt(np.maximum(quadratic[:, solid] @ monomials, 0))  # (n, H W), 1 on the surface
        thickness = pixel / anatomies.axes[:, solid].min(-1)
        cover = np.clip((1 - radius) / thickness[:, None] + 0.5, 0, 1)
        image += cover * (anatomies.hounsfield[:, solid, None] - image)
    return np.rint(image).astype(np.int16).reshape(-1, size, size)
