"""DICOM and NIfTI as pixels, with pydicom's and nibabel's own values as the reference; and gray ranges of a whole source."""

from __future__ import annotations

import gzip
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels import get_decoder
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLSLossless, generate_uid

from fedmerge.data.cache import Rows
from fedmerge.data.datasets import _decode
from fedmerge.data.datasets._base import Geometry
from fedmerge.data.datasets._decode import decode_all, pixels_of
from fedmerge.data.datasets._formats import pictures
from fedmerge.data.datasets._picture import Deep, Reading
from fedmerge.data.datasets.image_folder import ImageFolder
from fedmerge.data.image_sample import look
from fedmerge.data.partition import own_split
from fedmerge.errors import DataError, MissingExtra, extras_named

SIDE = 24
GRAY = Geometry(SIDE, 1)
RNG = np.random.default_rng(0)
HOUNSFIELD = RNG.integers(-1000, 1500, (SIDE, SIDE)).astype(np.int16)


def dicom(path: Path, values: NDArray[Any], **tags: Any) -> None:
    """A DICOM file of stored values (H, W), (frames, H, W), or (H, W, 3) for colors."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Modality, file.PatientID, file.PatientName = "CT", "P1", "Zorn^Zacharias"
    color = values.ndim == 3 and values.shape[-1] == 3
    file.SamplesPerPixel, file.PhotometricInterpretation = (3, "RGB") if color else (1, "MONOCHROME2")
    if color:
        file.PlanarConfiguration = 0
    elif values.ndim == 3:
        file.NumberOfFrames = len(values)
    file.Rows, file.Columns = values.shape[:2] if color else values.shape[-2:]
    file.BitsAllocated = file.BitsStored = 8 * values.dtype.itemsize
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(values.dtype.kind == "i")
    file.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(file, name, value)
    file.save_as(path, enforce_file_format=True)


def nifti(path: Path, values: NDArray[Any], affine: NDArray[Any] | None = None) -> None:
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


def by(levels: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    return np.rint((levels.astype(float) - low) * 255 / (high - low)).clip(0, 255).astype(np.uint8)


def all_of(folder: Path, names: list[str], geometry: Geometry, how: Reading) -> dict[str, NDArray[Any]]:
    rows = Rows()
    return {**decode_all(folder, names, geometry, how, "x", rows), "pixels": rows.done()}


def decoded(folder: Path, **how: Any) -> dict[str, NDArray[Any]]:
    names = sorted(file.name for file in folder.iterdir())
    return all_of(folder, names, GRAY, Reading(**how))


def test_values_are_those_after_rescaling(tmp_path: Path) -> None:
    stored = (HOUNSFIELD.astype(int) + 1024).astype(np.uint16)
    dicom(tmp_path / "a.dcm", stored, RescaleSlope=1, RescaleIntercept=-1024)
    dicom(tmp_path / "b", HOUNSFIELD)  # told by what it holds
    found = decoded(tmp_path, gray_range=(-160, 240))
    for pixels in found["pixels"]:
        assert np.array_equal(pixels[..., 0], by(HOUNSFIELD, -160, 240))
    assert "text burned into the pixels, such as names, is not looked for" in " ".join(found["notes"])


def test_fractions_stay_fractions(tmp_path: Path) -> None:
    dicom(tmp_path / "a.dcm", HOUNSFIELD, RescaleSlope=0.25, RescaleIntercept=0)
    (opened,) = pictures(tmp_path / "a.dcm")
    assert isinstance(opened.picture, Deep)
    assert np.array_equal(opened.picture.values, HOUNSFIELD * 0.25)


@pytest.mark.parametrize(
    ("tags", "slope", "intercept"),
    [
        ({"RescaleIntercept": -500}, 1, -500),
        ({"RescaleSlope": 2}, 2, 0),
        ({"RescaleSlope": "", "RescaleIntercept": ""}, 1, 0),
        ({"RescaleSlope": 2, "RescaleIntercept": ""}, 2, 0),
    ],
)
def test_a_slope_or_an_intercept_may_stand_alone_or_be_empty(tmp_path: Path, tags: Any, slope: int, intercept: int) -> None:
    dicom(tmp_path / "a.dcm", HOUNSFIELD, **tags)
    found = decoded(tmp_path, gray_range=(-900, 900))["pixels"][0, ..., 0]
    assert np.array_equal(found, by(HOUNSFIELD.astype(float) * slope + intercept, -900, 900))


@pytest.mark.parametrize("shared", [True, False])
def test_an_enhanced_file_is_rescaled_and_shown_as_its_frame_says(tmp_path: Path, shared: bool) -> None:
    def group(number: int) -> Dataset:
        values, window, found = Dataset(), Dataset(), Dataset()
        values.RescaleSlope, values.RescaleIntercept = 1, -1024 - number
        window.WindowCenter, window.WindowWidth = 40.5 + number, 401
        found.PixelValueTransformationSequence, found.FrameVOILUTSequence = [values], [window]
        return found

    frames = np.stack([HOUNSFIELD.astype(int) + 1024] * 3).astype(np.uint16)
    name, groups = ("Shared", [group(0)]) if shared else ("PerFrame", [group(number) for number in range(3)])
    dicom(tmp_path / "a.dcm", frames, **{f"{name}FunctionalGroupsSequence": groups})
    found, number = decoded(tmp_path, frame=3), 0 if shared else 2
    assert found["range"].tolist() == [-160 + number, 240 + number]
    assert np.array_equal(found["pixels"][0, ..., 0], by(HOUNSFIELD.astype(int) - number, -160 + number, 240 + number))


def test_an_exact_window_has_no_half_step(tmp_path: Path) -> None:
    dicom(tmp_path / "a.dcm", HOUNSFIELD, WindowCenter=40, WindowWidth=400, VOILUTFunction="LINEAR_EXACT")
    assert decoded(tmp_path)["range"].tolist() == [-160, 240]


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("bits", [1, 6])
def test_fewer_than_8_bits_are_as_bright_as_8(tmp_path: Path, bits: int, kind: str) -> None:
    stored, top = RNG.integers(0, 2**bits, (SIDE, SIDE)).astype(np.uint8), 2**bits - 1
    dicom(tmp_path / "a.dcm", stored, BitsStored=bits, HighBit=bits - 1, PhotometricInterpretation=kind)
    packed = np.packbits(stored.ravel() & 1, bitorder="little")[None]
    dicom(tmp_path / "b.dcm", packed, Rows=SIDE, Columns=SIDE, BitsAllocated=1, BitsStored=1, HighBit=0)
    first, second = decoded(tmp_path)["pixels"][..., 0]
    shown = by(stored, 0, top)
    assert np.array_equal(first, 255 - shown if kind == "MONOCHROME1" else shown)
    assert np.array_equal(second, 255 * (stored & 1))


def test_a_palette_of_8_bits_that_says_16_is_not_black(tmp_path: Path) -> None:
    stored, colors = RNG.integers(0, 4, (SIDE, SIDE)).astype(np.uint8), RNG.integers(0, 256, (4, 3)).astype(np.uint16)
    path = tmp_path / "a.dcm"
    for shift in (0, 8):
        dicom(path, stored, PhotometricInterpretation="PALETTE COLOR")
        file = pydicom.dcmread(path)
        for tag, name, values in zip((0x00281101, 0x00281102, 0x00281103), ("Red", "Green", "Blue"), colors.T, strict=True):
            file.add_new(tag, "US", [4, 0, 16])
            setattr(file, f"{name}PaletteColorLookupTableData", (values << shift).tobytes())
        file.save_as(path)
        assert np.array_equal(all_of(tmp_path, ["a.dcm"], Geometry(SIDE, 3), Reading())["pixels"][0], colors[stored])


def test_the_window_that_all_files_name_is_the_range(tmp_path: Path) -> None:
    for name in "ab":
        dicom(tmp_path / f"{name}.dcm", HOUNSFIELD, WindowCenter=[40.5, 300], WindowWidth=[401, 1500])
    found = decoded(tmp_path)
    assert found["range"].tolist() == [-160, 240]
    assert np.array_equal(found["pixels"][0, ..., 0], by(HOUNSFIELD, -160, 240))


def test_windows_that_differ_need_a_word(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        dicom(tmp_path / f"{name}.dcm", HOUNSFIELD, WindowCenter=40.5 + 100 * number, WindowWidth=401)
    with pytest.raises(DataError, match=r"2 different windows in 2 images \(range: auto\)") as error:
        decoded(tmp_path)
    assert "Set range in the source: {window: [black, white]}" in error.value.told
    found = decoded(tmp_path, rule="file")
    assert [np.array_equal(p[..., 0], by(HOUNSFIELD, -160 + 100 * n, 240 + 100 * n)) for n, p in enumerate(found["pixels"])]
    assert found["range"].size == 0
    dicom(tmp_path / "c.dcm", HOUNSFIELD)
    with pytest.raises(DataError, match="2 different windows in 3 images, and 1 images without one"):
        decoded(tmp_path)
    with pytest.raises(DataError, match="1 of 3 deep images without a window of their own"):
        decoded(tmp_path, rule="file")


def lut(count: int, bits: int, first: int, data: Any) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS", [count, first, bits])
    item.add_new("LUTData", "OW" if isinstance(data, bytes) else "US", data)
    return item


CURVES = {
    "SIGMOID": {"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "SIGMOID"},
    "VOI LUT sequence": {"VOILUTSequence": [lut(101, 12, -50, [40 * n for n in range(50)] + [4095] * 51)]},
    "VOI LUT sequence of bytes": {
        "VOILUTSequence": [lut(101, 8, -50, np.array([2 * n for n in range(50)] + [255] * 51, "<u2").tobytes())]
    },
}


@pytest.mark.parametrize("kind", CURVES)
def test_a_curve_is_each_files_own_and_needs_a_word(tmp_path: Path, kind: str) -> None:
    dicom(tmp_path / "zorn.dcm", HOUNSFIELD, **CURVES[kind])
    with pytest.raises(DataError, match=r"zorn.dcm \((SIGMOID|VOI LUT sequence)\); expected one range") as error:
        decoded(tmp_path)
    assert error.value.told.startswith("source.range: found DICOM files that show their values by a curve")
    x = HOUNSFIELD.astype(float)
    if kind == "SIGMOID":
        shown = 255 / (1 + np.exp(-4 * (x - 40) / 400))
    else:
        step, top = (2, 255) if "bytes" in kind else (40, 4095)
        shown = np.where(x >= 0, top, step * (x + 50).clip(0)) * 255 / top
    assert np.array_equal(decoded(tmp_path, rule="file")["pixels"][0, ..., 0], np.rint(shown))
    assert np.array_equal(decoded(tmp_path, gray_range=(-160, 240))["pixels"][0, ..., 0], by(HOUNSFIELD, -160, 240))
    assert look([tmp_path / "zorn.dcm"]).keys == {"range": "file"}


def test_heads_that_do_not_fit_their_pixels_are_damage(tmp_path: Path) -> None:
    dicom(tmp_path / "a.dcm", np.stack([HOUNSFIELD, HOUNSFIELD]), NumberOfFrames=1)
    dicom(tmp_path / "b.dcm", HOUNSFIELD, RescaleSlope="1e400", RescaleIntercept=0)
    nifti(tmp_path / "c.nii", np.zeros((0, 4, 4), np.float32))
    found = decoded(tmp_path, gray_range=(-160, 240))
    assert found["reasons"].tolist() == [
        "pixels of 2 frames of the size that its head says, and one frame by its head",
        "no finite value",
        "no voxel in a volume of 0 x 4 x 4",
    ]
    nifti(tmp_path / "d.nii", np.full((4, 4, 4), np.nan, np.float32))
    assert look([tmp_path / "d.nii"]).keys == {}


def test_where_white_is_low_it_is_turned(tmp_path: Path) -> None:
    dicom(tmp_path / "a.dcm", HOUNSFIELD, PhotometricInterpretation="MONOCHROME1")
    small = RNG.integers(0, 256, (SIDE, SIDE)).astype(np.uint8)
    dicom(tmp_path / "b.dcm", small, PhotometricInterpretation="MONOCHROME1")
    found = decoded(tmp_path, gray_range=(-160, 240))["pixels"]
    assert np.array_equal(found[0, ..., 0], 255 - by(HOUNSFIELD, -160, 240))
    assert np.array_equal(found[1, ..., 0], 255 - small)


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_no_value(tmp_path: Path, kind: str) -> None:
    padded = HOUNSFIELD.copy()
    padded[:3] = -2000
    dicom(tmp_path / "a.dcm", padded, PixelPaddingValue=-2000, PhotometricInterpretation=kind)
    found = decoded(tmp_path, rule="full")
    assert found["range"].tolist() == [HOUNSFIELD[3:].min(), HOUNSFIELD[3:].max()]
    assert not found["pixels"][0, :3].any()


def test_several_frames_need_the_one_asked_for(tmp_path: Path) -> None:
    frames = RNG.integers(-1000, 1500, (4, SIDE, SIDE)).astype(np.int16)
    dicom(tmp_path / "a.dcm", frames)
    for how, said in (({}, "(4 frames)"), ({"frame": 5}, "(4 frames, and no frame 5)")):
        with pytest.raises(DataError) as error:
            decoded(tmp_path, gray_range=(-160, 240), **how)
        assert said in str(error.value)
        assert error.value.told.startswith("source.frame: found DICOM or NIfTI files of several frames")
    found = decoded(tmp_path, gray_range=(-160, 240), frame=3)
    assert np.array_equal(found["pixels"][0, ..., 0], by(frames[2], -160, 240))


def test_colors_palettes_and_small_grays_are_as_they_are(tmp_path: Path) -> None:
    color = RNG.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    dicom(tmp_path / "a.dcm", color)
    assert np.array_equal(all_of(tmp_path, ["a.dcm"], Geometry(SIDE, 3), Reading())["pixels"][0], color)
    for name in ("examples_palette.dcm", "SC_rgb_rle.dcm", "SC_ybr_full_422_uncompressed.dcm", "SC_rgb_small_odd_jpeg.dcm"):
        (opened,) = pictures(Path(str(get_testdata_file(name))))
        assert isinstance(opened.picture, Image.Image), name
        assert opened.picture.mode == "RGB"


@pytest.mark.parametrize(
    "name", ["MR_small_RLE.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "MR_small_jp2klossless.dcm"]
)
def test_one_picture_however_it_is_written(name: str) -> None:
    (plain,), (other,) = (pictures(Path(str(get_testdata_file(file)))) for file in ("MR_small.dcm", name))
    assert isinstance(plain.picture, Deep)
    assert isinstance(other.picture, Deep)
    assert np.array_equal(plain.picture.values, other.picture.values)
    assert plain.picture.window == other.picture.window


def test_a_codec_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    if get_decoder(JPEGLSLossless).is_available:
        pytest.skip("a package here decodes JPEG-LS")
    (tmp_path / "zorn.dcm").write_bytes(Path(str(get_testdata_file("MR_small_jpeg_ls_lossless.dcm"))).read_bytes())
    with pytest.raises(DataError) as error:
        decoded(tmp_path)
    assert "zorn.dcm (JPEG-LS Lossless Image Compression)" in str(error.value)
    assert error.value.told.startswith(
        "source.root: found DICOM files that are compressed in a way that no installed package reads"
    )
    assert "pip install python-gdcm" in error.value.told
    assert "zorn" not in error.value.told
    shutil.copy(str(get_testdata_file("MR_small_jpeg_ls_lossless.dcm")), tmp_path / "zorn.dcm")
    header = pydicom.dcmread(tmp_path / "zorn.dcm")
    header.NumberOfFrames = 2
    header.save_as(tmp_path / "zorn.dcm")
    with pytest.raises(DataError, match=r"found JPEG-LS Lossless Image Compression; expected a package that does"):
        look([tmp_path / "zorn.dcm"])


def test_files_without_pixels_and_no_dicom_at_all_are_told_apart(tmp_path: Path) -> None:
    for name in ("test-SR.dcm", "rtplan.dcm"):
        (tmp_path / name).write_bytes(Path(str(get_testdata_file(name))).read_bytes())
    (tmp_path / "half.dcm").write_bytes(Path(str(get_testdata_file("MR_small.dcm"))).read_bytes()[:5000])
    (tmp_path / "notes.dcm").write_text("no image")
    for name, key, value in (("empty", "PixelData", b""), ("flat", "Rows", None)):
        dicom(tmp_path / f"{name}.dcm", HOUNSFIELD, **{key: value})
    found = decoded(tmp_path)
    reasons = dict(zip(sorted(file.name for file in tmp_path.iterdir()), found["reasons"], strict=True))
    assert reasons["test-SR.dcm"] == "DICOM without pixels (SR)"
    assert reasons["rtplan.dcm"] == "DICOM without pixels (RTPLAN)"
    assert reasons["notes.dcm"] == "no image"
    assert reasons["empty.dcm"] == "DICOM without pixels (CT)"
    assert reasons["flat.dcm"] == "DICOM without Rows"
    assert "pixel data" in reasons["half.dcm"]


def test_text_that_a_file_says_to_hold_is_counted(tmp_path: Path) -> None:
    dicom(tmp_path / "a.dcm", HOUNSFIELD, BurnedInAnnotation="YES")
    dicom(tmp_path / "b.dcm", HOUNSFIELD, BurnedInAnnotation="NO")
    notes = decoded(tmp_path, gray_range=(-160, 240))["notes"]
    assert (
        "2 files are DICOM: text burned into the pixels, which 1 of them say they have, such as names, is not looked for" in notes
    )


def test_missing_packages_name_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package in (("a.dcm", "pydicom"), ("a.nii.gz", "nibabel")):
        (tmp_path / name).write_bytes(b"x")
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtra, match=rf"fedmerge\[{'dicom' if package == 'pydicom' else 'nifti'}\]") as error:
            pictures(tmp_path / name)
        assert error.value.told == str(error.value)


VOLUME = RNG.integers(0, 1000, (6, 8, 10)).astype(np.int16)  # to the patient's right, front and head


@pytest.mark.parametrize(
    ("axis", "slice_of"),
    [
        ("axial", lambda v, k: v[::-1, ::-1, k].T),
        ("coronal", lambda v, k: v[::-1, k, ::-1].T),
        ("sagittal", lambda v, k: v[k, ::-1, ::-1].T),
    ],
)
def test_slices_lie_as_radiologists_look_at_them_however_they_are_stored(tmp_path: Path, axis: str, slice_of: Any) -> None:
    nifti(tmp_path / "a.nii", VOLUME)
    nifti(
        tmp_path / "b.nii.gz",
        VOLUME[::-1].transpose(2, 0, 1).copy(),
        np.array([[0, -1, 0, 5], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]),
    )
    middle = VOLUME.shape[{"sagittal": 0, "coronal": 1, "axial": 2}[axis]] // 2
    for name in ("a.nii", "b.nii.gz"):
        (opened,) = pictures(tmp_path / name, Reading(axis=axis))
        assert isinstance(opened.picture, Deep)
        assert np.array_equal(opened.picture.values, slice_of(VOLUME, middle)), name


def test_which_slices(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii", VOLUME)
    assert len(pictures(tmp_path / "a.nii", Reading(slices="all"))) == 10
    first, last = (one.picture for one in pictures(tmp_path / "a.nii", Reading(slices=(1, 10))))
    assert isinstance(first, Deep)
    assert isinstance(last, Deep)
    assert np.array_equal(first.values, VOLUME[::-1, ::-1, 0].T)
    assert np.array_equal(last.values, VOLUME[::-1, ::-1, 9].T)
    with pytest.raises(DataError, match=r"a.nii \(10 slices, and no slice 11\)"):
        decoded(tmp_path, slices=(11,))


def test_volumes_over_time_need_one(tmp_path: Path) -> None:
    series = np.stack([VOLUME, VOLUME + 1], -1)
    nifti(tmp_path / "a.nii", series)
    with pytest.raises(DataError, match="2 volumes"):
        decoded(tmp_path)
    (opened,) = pictures(tmp_path / "a.nii", Reading(frame=2))
    assert isinstance(opened.picture, Deep)
    assert np.array_equal(opened.picture.values, VOLUME[::-1, ::-1, 5].T + 1)


def test_a_checksum_behind_a_volume_that_is_wrong_is_damage(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii.gz", VOLUME)
    data = bytearray((tmp_path / "a.nii.gz").read_bytes())
    data[-6] ^= 1
    (tmp_path / "b.nii.gz").write_bytes(data)
    found = decoded(tmp_path)
    assert found["good"].tolist() == [0]
    assert found["reasons"][0].startswith("CRC check failed")


def test_volumes_that_cannot_be_read_are_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_text("no volume")
    (tmp_path / "b.nii.gz").write_text("no volume")
    nifti(tmp_path / "c.nii", VOLUME)
    (tmp_path / "c.nii").write_bytes((tmp_path / "c.nii").read_bytes()[:500])
    nifti(tmp_path / "d.nii", VOLUME[0])
    assert decoded(tmp_path)["broken"].tolist() == [0, 1, 2, 3]


def test_a_slice_of_no_number_is_black_among_others(tmp_path: Path) -> None:
    values = VOLUME.astype(np.float32)
    values[..., 0] = np.nan
    nifti(tmp_path / "a.nii", values)
    for rule in ("auto", (1.0, 99.0)):
        found = decoded(tmp_path, slices="all", rule=rule)
        assert len(found["pixels"]) == VOLUME.shape[2]
        assert not found["pixels"][0].any()
    assert decoded(tmp_path, slices=(1,))["reasons"].tolist() == ["no finite value"]


def test_a_volume_that_the_memory_does_not_hold_is_one_message(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii", VOLUME)
    data = bytearray((tmp_path / "a.nii").read_bytes())
    data[40:48] = np.array([3, 32767, 32767, 32767], "<i2").tobytes()
    (tmp_path / "zorn.nii.gz").write_bytes(gzip.compress(bytes(data)))
    with pytest.raises(DataError, match=r"1 images that do not go into the memory of this machine: zorn.nii.gz") as error:
        decoded(tmp_path)
    assert error.value.told.startswith("source.root: found images that do not go into the memory")
    with pytest.raises(DataError, match="Make them smaller, or take a machine with more memory"):
        look([tmp_path / "zorn.nii.gz"])


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    for number in range(8):
        place = tmp_path / "images/mri" / ("ill", "well")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        nifti(place / f"P{number}.nii.gz", VOLUME + 10 * number)
    return tmp_path


def test_slices_of_a_volume_are_images_of_one_group(volumes: Path) -> None:
    source = ImageFolder(root=str(volumes / "images"), slices="all")
    images = source.load(GRAY, "x", 0)
    assert len(images) == 80
    assert np.bincount(images.groups).tolist() == [10] * 8
    assert np.bincount(images.labels).tolist() == [40, 40]
    train, held = own_split(images, "x", 0.3, 0)
    assert not set(images.groups[train]) & set(images.groups[held])
    assert len(ImageFolder(root=str(volumes / "images"), slices=3).load(GRAY, "x", 0)) == 8


@pytest.mark.parametrize("rule", ["full", {"percentile": [5, 95]}, {"window": [100, 900]}, "auto"])
def test_one_range_for_all_images_of_a_site_is_told(volumes: Path, monkeypatch: pytest.MonkeyPatch, rule: Any) -> None:
    monkeypatch.setenv("FEDMERGE_CACHE", str(volumes / "cache"))
    source = ImageFolder(root=str(volumes / "images"), range=rule)
    assert source.decided("x") == {}
    images = source.load(GRAY, "x", 0)
    middle = np.stack([VOLUME[..., 5] + 10 * number for number in range(8)])
    low, high = {
        "full": (middle.min(), middle.max()),
        "auto": (0, 1023 if middle.max() < 1024 else 4095),
    }.get(rule if isinstance(rule, str) else "", np.percentile(middle, [5, 95]).tolist())
    low, high = (100, 900) if rule == {"window": [100, 900]} else (low, high)
    assert source.decided("x")["gray_range"] == {"range": [low, high], "images": 8, "rule": rule}
    assert source.decided("y") == {}
    assert ImageFolder(root=str(volumes / "images"), range=rule, slices="all").decided("x") == {}
    assert images.pixels.min() == 0
    assert images.pixels.max() >= (50 if rule == "auto" else 200)


def test_a_window_is_the_range_of_before(volumes: Path) -> None:
    new = ImageFolder(root=str(volumes / "images"), range={"window": [0, 1200]})
    old = ImageFolder(root=str(volumes / "images"), gray_range=(0, 1200))
    assert new.identity("x", 0) == old.identity("x", 0)
    assert np.array_equal(new.load(GRAY, "x", 0).pixels, old.load(GRAY, "x", 0).pixels)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"range": "full", "gray_range": [0, 1]}, "expected one of them"),
        ({"range": {"percentile": [99, 1]}}, "expected"),
        ({"range": {"percentile": [1, 101]}}, "less than or equal to 100"),
        ({"range": "window"}, "range"),
        ({"slices": []}, "slices"),
        ({"slices": 0}, "slices"),
        ({"frame": 0}, "frame"),
        ({"axis": "oblique"}, "axis"),
    ],
)
def test_keys_that_cannot_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ImageFolder(root=".", **fields)


def test_one_value_has_no_range(tmp_path: Path) -> None:
    dicom(tmp_path / "a.dcm", np.full((SIDE, SIDE), 7, np.int16))
    for rule in ("full", (1.0, 99.0)):
        with pytest.raises(DataError, match="one value only, 7"):
            decoded(tmp_path, rule=rule)


def test_deep_pillow_files_have_percentiles_too(tmp_path: Path) -> None:
    values = RNG.standard_normal((SIDE, SIDE)).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    Image.fromarray((values * 10).astype(np.float32)).save(tmp_path / "b.tif")
    found = decoded(tmp_path, rule=(1.0, 99.0))
    both = np.concatenate([values.ravel(), (values * 10).astype(np.float32).ravel()])
    assert found["range"].tolist() == np.percentile(both, [1, 99]).tolist()
    assert "percentiles 1 and 99" in " ".join(found["notes"])


def test_a_header_that_is_a_little_wrong_is_read() -> None:
    for name in ("no_meta.dcm", "ExplVR_LitEndNoMeta.dcm", "ExplVR_BigEndNoMeta.dcm"):
        path = Path(str(get_testdata_file(name)))
        if "PixelData" in pydicom.dcmread(path, force=True):
            assert pictures(path, Reading(frame=1))


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_slices_of_volumes_that_lie_in_every_way_fill_the_rows(tmp_path: Path, axis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their numbers are told by heads, before anything is decoded; a picture between them and broken volumes leave no gap."""
    turned = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], float)
    nifti(tmp_path / "a.nii", VOLUME[:5])
    nifti(tmp_path / "b.nii.gz", VOLUME, turned)
    (tmp_path / "c.nii").write_bytes((tmp_path / "a.nii").read_bytes()[:600])
    nifti(tmp_path / "d.nii", VOLUME)
    flat = (tmp_path / "d.nii").read_bytes()
    (tmp_path / "d.nii").write_bytes(flat[:312] + bytes(16) + flat[328:])  # srow_z: no axis leads to the head
    Image.fromarray(np.full((4, 4), 77, np.uint8)).save(tmp_path / "e.png")
    nifti(tmp_path / "f.nii", VOLUME[:, :3])
    found = decoded(tmp_path, axis=axis, slices="all", gray_range=(0.0, 2000.0))
    files, how = {0: "a.nii", 1: "b.nii.gz", 5: "f.nii"}, Reading(axis=axis, slices="all")
    volumes = {at: pictures(tmp_path / name, how) for at, name in files.items()}
    assert found["broken"].tolist() == [2, 3]
    assert found["good"].tolist() == [0] * len(volumes[0]) + [1] * len(volumes[1]) + [4] + [5] * len(volumes[5])
    expected = [pixels_of(one, GRAY, Reading((0, 2000)))[0] for at in (0, 1) for one in volumes[at]]
    expected += [np.full((SIDE, SIDE, 1), 77, np.uint8)]
    expected += [pixels_of(one, GRAY, Reading((0, 2000)))[0] for one in volumes[5]]
    assert np.array_equal(found["pixels"], np.stack(expected))
    monkeypatch.setattr(_decode, "MANY", 1)
    several = decoded(tmp_path, axis=axis, slices="all", gray_range=(0.0, 2000.0))
    assert all(np.array_equal(several[name], found[name]) for name in found)


def test_a_package_that_is_missing_is_named_by_processes_too() -> None:
    with pytest.raises(MissingExtra) as missing, extras_named():
        raise ModuleNotFoundError("No module named 'nibabel'", name="nibabel")
    again = pickle.loads(pickle.dumps(missing.value))
    assert (str(again), again.name, again.told) == (str(missing.value), "nibabel", str(missing.value))
