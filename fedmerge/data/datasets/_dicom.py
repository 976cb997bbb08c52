"""One DICOM file as a picture (pydicom): the values that it means, its window or curve, one frame of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedmerge.data.datasets._picture import Deep, Opened, Reading, Refused, as_damage, quiet
from fedmerge.errors import extras_named


def dicom(path: Path, how: Reading) -> Opened:
    """The picture of a DICOM file. Values are those that the file means, e.g. Hounsfield units; a window is its first."""
    with extras_named():
        import pydicom
        from pydicom.pixels import get_decoder, pixel_array
    with quiet("pydicom"), as_damage(pydicom.errors.InvalidDicomError, AttributeError):
        header = pydicom.dcmread(path, force=True)
        with path.open("rb") as file:
            start = file.read(132)
        if not any(header.get(name) for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            marked = "SOPClassUID" in header or start[128:] == b"DICM"
            raise ValueError(f"DICOM without pixels ({header.get('Modality') or 'no modality'})" if marked else "no image")
        missing = [name for name in ("Rows", "Columns", "PhotometricInterpretation") if not header.get(name)]
        if missing:
            raise ValueError(f"DICOM without {' and '.join(missing)}")
        frames, size = int(header.get("NumberOfFrames") or 1), int(header.Rows) * int(header.Columns)
        if size > how.max_pixels:
            raise Refused("max_pixels", f"{header.Columns} x {header.Rows} = {size} pixels")
        if frames > 1 and (how.frame is None or how.frame > frames):
            raise Refused("frame", f"{frames} frames" + (f", and no frame {how.frame}" if how.frame else ""))
        syntax = header.file_meta.get("TransferSyntaxUID") or _plain_syntax(header)
        header.file_meta.TransferSyntaxUID = syntax
        if syntax.is_compressed and not syntax.is_deflated and not _decodes(get_decoder, syntax):
            raise Refused("codec", syntax.name)
        frame = how.frame - 1 if frames > 1 and how.frame else 0
        raw = pixel_array(header, index=frame if frames > 1 else None)
        picture = _shown(raw, header, frame, how)
    return Opened(picture, 1, 1, burned=str(header.get("BurnedInAnnotation") or ""))


def _plain_syntax(header: Any) -> Any:
    """How a file without a header of its own is written: as it was read."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    implicit, little = header.original_encoding
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def _decodes(get_decoder: Any, syntax: Any) -> bool:
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _shown(raw: NDArray[Any], header: Any, frame: int, how: Reading) -> Image.Image | Deep:
    """Gray values after the modality's rescaling, with the padding around a round picture in black; colors as they are."""
    from pydicom.pixels import apply_color_lut

    kind = str(header.get("PhotometricInterpretation", "MONOCHROME2"))
    if kind == "PALETTE COLOR":
        raw = apply_color_lut(raw, header)
        if raw.dtype == np.uint16:  # tables of 8 bits that say that they have 16 would be black
            raw = (raw >> 8 if raw.max() > 255 else raw).astype(np.uint8)
    if raw.ndim != (3 if header.get("SamplesPerPixel") == 3 or kind == "PALETTE COLOR" else 2):
        raise ValueError(f"pixels of {len(raw)} frames of the size that its head says, and one frame by its head")
    if raw.ndim == 3:
        colors = raw[..., :3]
        return Image.fromarray(colors) if colors.dtype == np.uint8 else Deep(colors, None, False)
    shown_by = _of_frame(header, frame, "FrameVOILUTSequence")
    inverted, window = kind == "MONOCHROME1", _window(shown_by)
    padded = _padding(raw, header)
    values = _rescaled(raw, _of_frame(header, frame, "PixelValueTransformationSequence"))
    if how.gray_range is None and how.rule in ("auto", "file") and (curve := _curve(shown_by, window)):
        if how.rule == "auto":
            raise Refused("range", curve)
        values, window = _curved(values, shown_by, curve, header.file_meta.TransferSyntaxUID.is_little_endian)
    top = 2 ** int(header.get("BitsStored") or 8) - 1
    if values is raw and raw.dtype == np.uint8 and window is None and padded is None:
        shown = raw if top >= 255 else np.rint(raw * (255 / top)).clip(0, 255).astype(np.uint8)  # masks have 1 bit
        return Image.fromarray(255 - shown if inverted else shown)
    if values.dtype.kind == "f" and np.isfinite(values).all() and np.array_equal(values, np.rint(values)):
        values = values.astype(np.int64)
    if padded is not None:
        values = np.where(padded, np.inf if inverted else -np.inf, values)
    return Deep(values, None, inverted, window)


def _of_frame(header: Any, frame: int, macro: str) -> Any:
    """Where an enhanced file says something of one frame: in the frame's own group, else in that of all; otherwise its head."""
    for name, at in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = header.get(name) or ()
        if at < len(groups) and (found := groups[at].get(macro)):
            return found[0]
    return header


def _rescaled(raw: NDArray[Any], said: Any) -> NDArray[Any]:
    """Values as the modality means them. A slope or an intercept may stand alone: the other is 1 or 0 then."""
    from pydicom.pixels import apply_modality_lut

    if said.get("ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(raw, said))
    slope, intercept = said.get("RescaleSlope"), said.get("RescaleIntercept")
    if slope is None and intercept is None:
        return raw
    return raw.astype(np.float64) * float(1 if slope is None else slope) + float(intercept or 0)


def _padding(raw: NDArray[Any], header: Any) -> NDArray[np.bool_] | None:
    """Where the file says that there is no image; None where it says so of nothing, or of everything."""
    first = header.get("PixelPaddingValue")
    if first is None:
        return None
    last = header.get("PixelPaddingRangeLimit", first)
    padded: NDArray[np.bool_] = (raw >= min(first, last)) & (raw <= max(first, last))
    return padded if padded.any() and not padded.all() else None


def _window(said: Any) -> tuple[float, float] | None:
    """Least and greatest value of the first window (DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3), in values after rescaling."""
    center, width = (said.get(name) for name in ("WindowCenter", "WindowWidth"))
    center, width = (value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value for value in (center, width))
    exact = said.get("VOILUTFunction") in ("LINEAR_EXACT", "SIGMOID")
    if center is None or width is None or not float(width) > (0 if exact else 1):
        return None
    middle, reach = (float(center), float(width) / 2) if exact else (float(center) - 0.5, (float(width) - 1) / 2)
    return middle - reach, middle + reach


def _curve(said: Any, window: tuple[float, float] | None) -> str:
    """By what a file shows its values where that is no straight line; a window is preferred to a table."""
    if window is not None:
        return "SIGMOID" if said.get("VOILUTFunction") == "SIGMOID" else ""
    return "VOI LUT sequence" if said.get("VOILUTSequence") else ""


def _curved(values: NDArray[Any], said: Any, curve: str, little: bool) -> tuple[NDArray[Any], tuple[float, float]]:
    """Values as a file shows them, and its black and white (DICOM PS3.3, C.11.1.1 and C.11.2.1.3.1)."""
    if curve == "SIGMOID":
        low, high = _window(said) or (0, 1)
        return 1 / (1 + np.exp((-4 / (high - low) * (values.astype(np.float64) - (low + high) / 2)).clip(-500, 500))), (0, 1)
    item = said.VOILUTSequence[0]
    (count, first, bits), data = item.LUTDescriptor, item.LUTData
    count = count or 2**16
    if isinstance(data, bytes):
        data = np.frombuffer(data, np.uint8 if len(data) < 2 * count else "<u2" if little else ">u2")
    if len(data) < count:
        raise ValueError(f"a VOI LUT of {len(data)} entries, not the {count} that it declares")
    at = (np.rint(values).astype(np.int64) - first).clip(0, count - 1)
    return np.asarray(data, np.float64)[at], (0, 2**bits - 1)
