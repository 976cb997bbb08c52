"""One file as pictures, at their full depth: what Pillow reads, and DICOM and NIfTI.

A file that cannot be read now (no permission, a disk that fails) is told from one that is no image: only the latter is a
property of the file, which may be left out and remembered.
"""

from __future__ import annotations

import errno
import gzip
import logging
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fedmerge.errors import extras_named, first_line

DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, struct.error, zlib.error),
    *(RuntimeError, SystemError),  # of decoders in C
)
"""What Pillow raises for a file that is truncated or no image."""

MOST_PIXELS = 178_956_970
"""Where Pillow, too, suspects a file that was made to fill the memory."""

ONE_PICTURE = ("MPO", "PSD")
"""Formats whose further frames are previews or layers of the first."""

STEPS = {"L;2": 85, "L;4": 17}
"""Step between gray levels of 2 and 4 bits, by which Pillow stretches pixels but not the level that is transparent."""


DICOM_ENDS = (".dcm", ".dicom")
NIFTI_ENDS = (".nii", ".nii.gz")

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Number of the axis that slices are across, in a volume whose axes lead to the patient's right, front and head."""


class Reading(NamedTuple):
    """How files become pixels: fields of the source. gray_range: None finds one, by `rule`; page: from 1, None takes the first.

    rule: `auto`, `full`, `file`, or two percentiles. frame: of DICOM and NIfTI, from 1. axis, slices: of NIfTI volumes.
    """

    gray_range: tuple[float, float] | None = None
    background: str = "black"
    page: int | None = None
    max_pixels: int = MOST_PIXELS
    rule: str | tuple[float, float] = "auto"
    frame: int | None = None
    axis: str = "axial"
    slices: str | tuple[int, ...] = "middle"

    def determining(self) -> list[Any]:
        """What determines pixels, by its names where it is not as it always was: new keys change no digest of other sources."""
        given = {key: value for key, value in zip(self._fields[4:], self[4:], strict=True) if value != self._field_defaults[key]}
        return [*self[:3], *([given] if given else [])]


REFUSALS = {
    "root": (
        "files that cannot be read",
        "files that may be read. Mend that (permissions, the disk, the network) and run it again",
    ),
    "max_pixels": (
        "images of more pixels than max_pixels",
        "smaller ones. Make them smaller, or raise max_pixels in the source if the memory holds them",
    ),
    "frame": (
        "DICOM or NIfTI files of several frames without the frame asked for",
        "files of one frame, or a frame that all of them have. Set frame in the source, from 1",
    ),
    "slices": ("volumes without a slice asked for", "slices that all of them have. Set slices in the source, from 1, or all"),
    "codec": (
        "DICOM files that are compressed in a way that no installed package reads",
        "a package that does, e.g. pip install python-gdcm; or save them uncompressed, e.g. with gdcmconv --raw",
    ),
    "memory": (
        "images that do not go into the memory of this machine",
        "smaller ones. Make them smaller, or take a machine with more memory",
    ),
    "range": (
        "DICOM files that show their values by a curve (SIGMOID, or a table in their VOI LUT sequence)",
        "one range for all images of the source. Set range in the source: file shows each by its own curve, "
        "{window: [black, white]}, {percentile: [1, 99]} and full show values without it",
    ),
    "page": ("files of several pages without the page asked for", "a page that all of them have. Set page in the source"),
}
"""What stops a source, by the key that it is about: what was found, what is expected, and how to mend it.

codec, memory: of root.
"""


class Refused(Exception):
    """One file that stops the whole source. key: of REFUSALS."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(why)
        self.key = key


class Deep(NamedTuple):
    """An image of more than 8 bits. values: (H, W) or (H, W, 3) as in the file; alpha: (H, W) uint8; inverted: 0 is white.

    window: the least value that is shown as white, or black, by the file itself.
    """

    values: NDArray[Any]
    alpha: NDArray[np.uint8] | None
    inverted: bool
    window: tuple[float, float] | None = None


class Opened(NamedTuple):
    """One picture of a file, upright. pages: how many the file holds, of which this is one.

    burned: what a DICOM file says of text in its pixels: YES, NO or nothing; None of any other file.
    """

    picture: Image.Image | Deep
    orientation: int
    pages: int
    burned: str | None = None


PLAIN = Reading()


def pictures(path: Path, how: Reading = PLAIN) -> list[Opened]:
    """All pictures that a file gives: slices of a volume, one of any other. Raises one of DAMAGE, or Refused.

    DICOM and NIfTI are told by their ends, DICOM also by what it holds. Raises MissingExtra where they cannot be read.
    """
    name = path.name.casefold()
    if name.endswith(NIFTI_ENDS):
        return _nifti(path, how)
    if name.endswith(DICOM_ENDS):
        return [_dicom(path, how)]
    try:
        return [read(path, how)]
    except UnidentifiedImageError:
        with path.open("rb") as file:
            if file.read(132)[128:] != b"DICM":
                raise
    return [_dicom(path, how)]


def count_of(path: Path, how: Reading = PLAIN) -> int:
    """How many pictures a file gives, as far as its head tells: none where it cannot be read."""
    if not path.name.casefold().endswith(NIFTI_ENDS) or how.slices == "middle":
        return 1
    if not isinstance(how.slices, str):
        return len(how.slices)
    with suppress(*DAMAGE), _volume(path) as (volume, nibabel):
        return int(volume.shape[nibabel.io_orientation(volume.affine)[:, 0].tolist().index(AXES[how.axis])])
    return 0


def read(path: Path, how: Reading = PLAIN) -> Opened:
    """One picture of a file, at its full depth. Raises one of DAMAGE, or Refused."""
    with page_of(path, how) as (opened, pages):
        _in_order_of_bytes(opened)
        if (raw := _raw_mode(opened)) in STEPS and "transparency" in opened.info:
            opened.info["transparency"] *= STEPS[raw]
        deep = _deep(path, how, opened, raw)
        if deep is None:
            return Opened(ImageOps.exif_transpose(opened), 1, pages)
        return Opened(deep, int(opened.getexif().get(0x0112, 1)), pages)


@contextmanager
def page_of(path: Path, how: Reading) -> Iterator[tuple[Image.Image, int]]:
    """The chosen page of a file, and the number of pages. A file of one page is read whatever page is asked for."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours is the limit: one error, and no warning below it
    try:
        # A file and not its path: of a path Pillow maps raw TIFF into memory, and scrambles those that lie on their side
        with path.open("rb") as file, Image.open(file) as opened:
            pages = 1
            if opened.format not in ONE_PICTURE:
                with suppress(*DAMAGE):  # rubbish behind a first page that is whole
                    pages = getattr(opened, "n_frames", 1)
            if pages > 1 and how.page is not None:
                if how.page > pages:
                    raise Refused("page", f"{pages} pages, and no page {how.page}")
                opened.seek(how.page - 1)
            if opened.width * opened.height > how.max_pixels:
                raise Refused("max_pixels", f"{opened.width} x {opened.height} = {opened.width * opened.height} pixels")
            yield opened, pages
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _deep(path: Path, how: Reading, opened: Any, raw: str) -> Deep | None:
    """The values of an image of more than 8 bits a sample; None for any other."""
    tags = getattr(opened, "tag_v2", {})
    inverted, signed = tags.get(262) == 0, tags.get(339, (1,))[0] == 2  # photometric interpretation and sample format of TIFF
    transparent = opened.info.get("transparency")
    if opened.mode.startswith(("I", "F")):
        values = np.asarray(opened)
        if raw.startswith("I;32") and tags and not signed:
            values = values.view(np.uint32)
        if opened.format == "PPM" and opened.mode == "I":  # Pillow has stretched them to 16 bits
            values = np.rint(values * (_declared_top(path) / 65535)).astype(np.uint16)
        alpha = None if transparent is None else np.where(values == transparent, 0, 255).astype(np.uint8)
        return Deep(values, alpha, inverted)
    if opened.mode == "L" and signed and tags.get(258) == (8,):
        return Deep(np.asarray(opened).view(np.int8), None, inverted)
    if opened.format == "PPM" and opened.mode == "RGB" and _declared_top(path) > 255:
        return Deep(_deep_ppm(path, opened), None, False)
    if max(tags.get(258, (8,))) > 8 and tags.get(284) == 2:  # bits of a sample, and how colors lie
        raise ValueError(
            "16 bits a sample in a plane for each color, which cannot be read at its depth; save it with colors side by side"
        )
    return _deep_color(path, how, opened, raw) if ";16" in raw else None


def _raw_mode(opened: Any) -> str:
    """Pillow's name for how samples lie in the file; empty for formats that have none."""
    if not getattr(opened, "tile", None):
        return ""
    args = opened.tile[0].args
    return str(args[0] if isinstance(args, tuple) and args else args or "")


def _in_order_of_bytes(opened: Any) -> None:
    """Take packed values of a TIFF in this machine's order of bytes, in which libtiff gives them; Pillow turns some kinds round."""
    tiles = getattr(opened, "tile", None) or []
    if any(tile.codec_name == "libtiff" for tile in tiles):
        own = {f"{kind}B{end}": f"{kind}N{end}" for kind, end in (("I;16", "S"), ("I;32", "S"), ("F;32", "F"))}
        opened.tile = [tile._replace(args=(own.get(tile.args[0], tile.args[0]), *tile.args[1:])) for tile in tiles]


def _words(data: bytes) -> list[bytes]:
    """What stands in a text of the PGM and PPM family, without its comments."""
    return b" ".join(line.partition(b"#")[0] for line in data.splitlines()).split()


def _declared_top(path: Path) -> int:
    """The greatest value that a file of the PGM and PPM family declares."""
    with path.open("rb") as file:
        return int(_words(file.read(8192))[3])


def _deep_ppm(path: Path, opened: Any) -> NDArray[Any]:
    """Colors of a PPM of 16 bits, which Pillow would cut to 8."""
    tile, size = opened.tile[0], opened.width * opened.height * 3
    if tile.codec_name == "ppm":
        values = np.fromfile(path, ">u2", size, offset=tile.offset)
    else:
        values = np.array(_words(path.read_bytes())[4 : 4 + size]).astype(np.uint16)
    if len(values) < size:
        raise ValueError("image file is truncated")
    return values.reshape(opened.height, opened.width, 3)


def _deep_color(path: Path, how: Reading, opened: Any, raw: str) -> Deep:
    """Colors of 16 bits. Pillow keeps the upper byte of each sample only: the lower one is read as if bytes lay the other way."""
    if raw == "LA;16B":  # of PNG: two samples of two bytes lie where four of one byte would
        bytes_ = _unpacked(path, how, "RGBA").astype(np.uint16)
        return Deep(bytes_[..., 0] << 8 | bytes_[..., 1], bytes_[..., 2].astype(np.uint8), False)
    if raw[:-1] not in ("RGB;16", "RGBA;16", "RGBX;16"):
        raise ValueError(f"16 bits a sample as {raw}, which cannot be read at its depth")
    little = raw.endswith("L") or (raw.endswith("N") and sys.byteorder == "little")
    lower = _unpacked(path, how, raw[:-1] + ("B" if little else "L"))
    upper = np.asarray(opened)
    values = upper[..., :3].astype(np.uint16) << 8 | lower[..., :3]
    alpha = upper[..., 3] if raw.startswith("RGBA") else None
    if (clear := opened.info.get("transparency")) is not None:
        alpha = np.where((values == np.array(clear)).all(-1), 0, 255).astype(np.uint8)
    return Deep(values, alpha, False)


def _unpacked(path: Path, how: Reading, raw: str) -> NDArray[np.uint8]:
    """The pixels of a file as if its samples lay as `raw` says."""
    with page_of(path, how) as (opened, _):
        image: Any = opened
        image.tile = [tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw) for tile in image.tile]
        return np.asarray(image)


def _dicom(path: Path, how: Reading) -> Opened:
    """The picture of a DICOM file. Values are those that the file means, e.g. Hounsfield units; a window is its first."""
    with extras_named():
        import pydicom
        from pydicom.pixels import get_decoder, pixel_array
    with _quiet("pydicom"), _as_damage(pydicom.errors.InvalidDicomError, AttributeError):
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
        picture = _dicom_picture(raw, header, frame, how)
    return Opened(picture, 1, 1, burned=str(header.get("BurnedInAnnotation") or ""))


@contextmanager
def _quiet(package: str) -> Iterator[None]:
    """Without what a package says of headers that are a little wrong, which may hold names, to standard error."""
    log = logging.getLogger(package)
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


@contextmanager
def _as_damage(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of a package that are its own, as one of DAMAGE."""
    try:
        yield
    except kinds as error:
        raise ValueError(first_line(error)) from None


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


def _dicom_picture(raw: NDArray[Any], header: Any, frame: int, how: Reading) -> Image.Image | Deep:
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


@contextmanager
def _volume(path: Path) -> Iterator[tuple[Any, Any]]:
    """A volume whose voxels are read as they are needed, and the package. Raises one of DAMAGE, here and while it is read."""
    with extras_named():
        import nibabel
        from nibabel.filebasedimages import ImageFileError
        from nibabel.orientations import OrientationError
        from nibabel.spatialimages import HeaderDataError
        from nibabel.wrapstruct import WrapStructError
    with _quiet("nibabel"), _as_damage(ImageFileError, OrientationError, HeaderDataError, WrapStructError):
        yield nibabel.load(path), nibabel


def _nifti(path: Path, how: Reading) -> list[Opened]:
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


def failure_to_read(path: Path, error: Exception) -> int | None:
    """The system's number of what keeps a file from being read; None where its content is at fault.

    Decoders in C lose that number, and a damaged file that names a place outside of itself gives EINVAL: both are settled by
    reading the file once more.
    """
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return error.errno
    try:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    except OSError as failure:
        return failure.errno
    return None


def reason_of(error: Exception, path: Path) -> str:
    """Why a file is no image that can be used."""
    if not isinstance(error, UnidentifiedImageError):
        return " ".join(str(error).split()) or type(error).__name__
    with suppress(OSError), path.open("rb") as file:
        start = file.read(132)
        if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return "a TIFF of a kind that Pillow cannot read; it reads 8 and 16 bits, and one channel of 32-bit floats"
    return "no image"
