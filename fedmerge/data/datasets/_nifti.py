"""Slices of a NIfTI volume as pictures (nibabel)."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedmerge.data.datasets._picture import Deep, Opened, Reading, Refused, as_damage, quiet
from fedmerge.errors import extras_named

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Number of the axis that slices are across, in a volume whose axes lead to the patient's right, front and head."""


@contextmanager
def _volume(path: Path) -> Iterator[tuple[Any, Any]]:
    """A volume whose voxels are read as they are needed, and the package. Raises one of DAMAGE, here and while it is read."""
    with extras_named():
        import nibabel
        from nibabel.filebasedimages import ImageFileError
        from nibabel.orientations import OrientationError
        from nibabel.spatialimages import HeaderDataError
        from nibabel.wrapstruct import WrapStructError
    with quiet("nibabel"), as_damage(ImageFileError, OrientationError, HeaderDataError, WrapStructError):
        yield nibabel.load(path), nibabel


def slices_across(path: Path, axis: str) -> int:
    """How many slices a volume has across an axis of the patient. Raises one of DAMAGE."""
    with _volume(path) as (volume, nibabel):
        return int(volume.shape[nibabel.io_orientation(volume.affine)[:, 0].tolist().index(AXES[axis])])


def nifti(path: Path, how: Reading) -> list[Opened]:
    """Slices of a volume, as radiologists look at them: the patient's right, or front, is on the left."""
    with _volume(path) as (volume, nibabel):
        shape = volume.shape
        if len(shape) < 3 or len(shape) > 4:
            raise ValueError(f"{len(shape)} axes; expected a volume, or several over time")
        if 0 in shape:
            raise ValueError(f"no voxel in a volume of {' x '.join(map(str, shape))}")
        frames = shape[3] if len(shape) == 4 else 1
        if frames > 1 and (how.frame is None or how.frame > frames):
            raise Refused("frame", f"{frames} volumes" + (f", and no frame {how.frame}" if how.frame else ""))
        values = np.asanyarray(nibabel.as_closest_canonical(volume).dataobj)
        if path.name.casefold().endswith(".gz"):  # the checksum stands behind the voxels, where nibabel does not look
            with gzip.open(path) as unpacked:
                while unpacked.read(1 << 24):
                    pass
    if values.dtype.names or values.dtype.kind not in "iuf":
        raise ValueError(f"voxels of type {values.dtype}, which are no gray values")
    axis = AXES[how.axis]
    values = np.moveaxis(values[..., (how.frame or 1) - 1 if frames > 1 else 0] if len(shape) == 4 else values, axis, 0)
    size = values.shape[1] * values.shape[2]
    if size > how.max_pixels:
        raise Refused("max_pixels", f"{values.shape[1]} x {values.shape[2]} = {size} pixels")
    turned = values[:, ::-1, ::-1].transpose(0, 2, 1)  # rows from head to foot, or front to back
    return [Opened(Deep(turned[at], None, False), 1, 1) for at in _chosen(how.slices, len(turned))]


def _chosen(slices: str | tuple[int, ...], count: int) -> list[int]:
    """Numbers of the slices, from 0. Raises Refused where there are not as many."""
    if isinstance(slices, str):
        return list(range(count)) if slices == "all" else [count // 2]
    if max(slices) > count:
        raise Refused("slices", f"{count} slices, and no slice {max(slices)}")
    return [number - 1 for number in slices]
