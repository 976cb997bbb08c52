"""One image file as pixels, with PIL and numpy as the reference, and files that cannot be read."""

from __future__ import annotations

import struct
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features

from fedmerge.data.cache import Rows
from fedmerge.data.datasets import _decode
from fedmerge.data.datasets._base import Geometry
from fedmerge.data.datasets._decode import MANY, decode_all, pixels_of
from fedmerge.data.datasets._formats import read
from fedmerge.data.datasets._picture import Deep, Reading
from fedmerge.data.datasets.image_folder import ImageFolder
from fedmerge.errors import DataError

SIDE = 24
PLAIN = Reading()
GRAY = Geometry(SIDE, 1)
RNG = np.random.default_rng(0)
BITS_12 = RNG.integers(0, 4096, (SIDE, SIDE)).astype(np.uint16)
COLOR_12 = RNG.integers(0, 4096, (SIDE, SIDE, 3)).astype(np.uint16)
FOUR = RNG.integers(0, 65536, (SIDE, SIDE, 4)).astype(np.uint16)
HALF = RNG.standard_normal((SIDE, SIDE)).astype(np.float32)
WIDE = RNG.integers(0, 2**32, (SIDE, SIDE)).astype(np.uint32)
SOME = FOUR[..., 0].astype(np.int32) - 70_000


def png(path: Path, samples: NDArray[Any], kind: int, clear: tuple[int, ...] = ()) -> None:
    """A PNG of 16 bits, which Pillow writes in gray only. kind: 0 gray, 2 color, 4 and 6 the same with alpha."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    see_through = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) if clear else b""
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + see_through + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def tiff(path: Path, samples: NDArray[Any], photometric: int = 1, order: str = "<", extra: int | None = None) -> None:
    """A TIFF of one strip, of kinds that Pillow does not write."""
    size, count = samples.dtype.itemsize * 8, 1 if samples.ndim == 2 else samples.shape[2]
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    entries = [(256, "I", [samples.shape[1]]), (257, "I", [samples.shape[0]]), (258, "H", [size] * count), (259, "H", [1])]
    entries += [(262, "H", [photometric]), (273, "I", [8]), (277, "H", [count]), (278, "I", [samples.shape[0]])]
    entries += [(279, "I", [len(data)])] + ([(338, "H", [extra])] if extra is not None else []) + [(339, "H", [kind] * count)]
    at = 8 + len(data)
    directory, behind = struct.pack(order + "H", len(entries)), b""
    for tag, form, values in entries:
        packed = struct.pack(f"{order}{len(values)}{form}", *values)
        directory += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[form], len(values))
        if len(packed) <= 4:
            directory += packed.ljust(4, b"\0")
        else:
            directory += struct.pack(order + "I", at + 2 + 12 * len(entries) + 4 + len(behind))
            behind += packed
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", at)
    path.write_bytes(start + data + directory + bytes(4) + behind)


def pnm(path: Path, samples: NDArray[Any], top: int) -> None:
    kind = 5 if samples.ndim == 2 else 6
    path.write_bytes(f"P{kind}\n# 1 2 3\n{SIDE} {SIDE}\n{top}\n".encode() + samples.astype(">u2").tobytes())


def pnm_text(path: Path, samples: NDArray[Any], top: int) -> None:
    numbers = "\n".join(" ".join(map(str, row)) for row in samples.reshape(SIDE, -1))
    path.write_text(f"P{2 if samples.ndim == 2 else 3} {SIDE} {SIDE} {top} # no value\n{numbers}\n")


def pillow(path: Path, samples: NDArray[Any], **options: Any) -> None:
    Image.fromarray(samples).save(path, **options)


DEEP: dict[str, tuple[Any, NDArray[Any]]] = {
    "gray.png": (pillow, BITS_12),
    "color.png": (lambda path, it: png(path, it, 2), COLOR_12),
    "little.tif": (tiff, BITS_12),
    "big.tif": (lambda path, it: tiff(path, it, order=">"), BITS_12),
    "packed.tif": (lambda path, it: pillow(path, it, compression="tiff_lzw"), BITS_12),
    "signed.tif": (tiff, BITS_12.astype(np.int16) - 1024),
    "signed-big.tif": (lambda path, it: tiff(path, it, order=">"), BITS_12.astype(np.int16) - 1024),
    "signed-8.tif": (tiff, (BITS_12 % 256).astype(np.uint8).view(np.int8)),
    "unsigned-32.tif": (tiff, WIDE),
    "signed-32.tif": (tiff, SOME),
    "packed-32.tif": (lambda path, it: pillow(path, it, compression="tiff_deflate"), SOME),
    "float.tif": (tiff, HALF),
    "float-big.tif": (lambda path, it: tiff(path, it, order=">"), HALF),
    "color.tif": (lambda path, it: tiff(path, it, 2), COLOR_12),
    "color-big.tif": (lambda path, it: tiff(path, it, 2, ">"), COLOR_12),
    "4095.pgm": (lambda path, it: pnm(path, it, 4095), BITS_12),
    "65535.pgm": (lambda path, it: pnm(path, it, 65535), BITS_12),
    "text.pgm": (lambda path, it: pnm_text(path, it, 4095), BITS_12),
    "4095.ppm": (lambda path, it: pnm(path, it, 4095), COLOR_12),
    "text.ppm": (lambda path, it: pnm_text(path, it, 65535), COLOR_12),
    "float.pfm": (pillow, HALF),
    "gray.jp2": (lambda path, it: pillow(path, it, irreversible=False), BITS_12),
}


@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("predictor", [True, False])
@pytest.mark.parametrize("kind", ["<u2", ">u2", "<i2", ">i2", "<i4", ">i4", "<f4", ">f4"])
def test_packed_values_are_those_of_the_file_in_both_orders_of_bytes(kind: str, predictor: bool, tile: Any, tmp_path: Path) -> None:
    tifffile, values = pytest.importorskip("tifffile"), (RNG.standard_normal((SIDE, SIDE)) * 5000).astype(kind[1:])
    predictor = predictor and kind[1] != "f"
    tifffile.imwrite(tmp_path / "a.tif", values, byteorder=kind[0], compression="zlib", predictor=predictor, tile=tile)
    picture = read(tmp_path / "a.tif").picture
    assert isinstance(picture, Deep)
    assert np.array_equal(picture.values, values)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_plane_of_16_bits_for_each_color_is_told(compression: str | None, tmp_path: Path) -> None:
    tifffile, values = pytest.importorskip("tifffile"), COLOR_12.transpose(2, 0, 1).copy()
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", planarconfig="separate", compression=compression)
    with pytest.raises(ValueError, match="a plane for each color, which cannot be read at its depth; save it with colors side by"):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize("name", DEEP)
def test_deep_values_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    write, values = DEEP[name]
    write(tmp_path / name, values)
    picture = read(tmp_path / name).picture
    assert isinstance(picture, Deep)
    assert picture.alpha is None
    assert np.array_equal(picture.values, values)


@pytest.mark.parametrize("kind", [0, 2, 4, 6])
def test_deep_values_with_transparency(kind: int, tmp_path: Path) -> None:
    samples = {0: BITS_12[..., None], 2: COLOR_12, 4: FOUR[..., :2], 6: FOUR}[kind]
    clear = tuple(samples[0, 0].tolist()) if kind < 4 else ()
    png(tmp_path / "it.png", samples, kind, clear)
    picture = read(tmp_path / "it.png").picture
    assert isinstance(picture, Deep)
    values, alpha = (samples, 255 * (samples != clear).any(-1)) if clear else (samples[..., :-1], samples[..., -1] >> 8)
    assert np.array_equal(picture.values, values if values.shape[-1] == 3 else values[..., 0])
    assert np.array_equal(picture.alpha, alpha)


def decoded(root: Path, how: Reading = PLAIN, geometry: Geometry = GRAY) -> dict[str, NDArray[Any]]:
    names = sorted(file.name for file in root.iterdir() if not file.name.startswith("."))
    rows = Rows()
    return {**decode_all(root, names, geometry, how, "x", rows), "pixels": rows.done()}


def refusal(root: Path, how: Reading = PLAIN) -> DataError:
    with pytest.raises(DataError) as error:
        decoded(root, how)
    assert str(root) not in error.value.told
    assert not any(file.name in error.value.told for file in root.iterdir())
    return error.value


SPOT = np.indices((SIDE, SIDE)).sum(0) / (2 * SIDE - 2)
"""A slope from black to white."""


@pytest.mark.parametrize(
    ("values", "given"),
    [
        ((SPOT * 255).astype(np.uint16), None),
        ((SPOT * 4095).astype(np.uint16), None),
        ((SPOT * 65535).astype(np.uint16), None),
        ((SPOT * 3900).astype(np.int32), None),
        (SPOT.astype(np.float32), None),
        ((SPOT * 4095).astype(np.float32), None),
        ((SPOT * 400 - 160).astype(np.int16), (-160.0, 240.0)),
        ((SPOT * 6 - 3).astype(np.float32), (-3.0, 3.0)),
        ((SPOT * 1e6).astype(np.int32), (0.0, 1e6)),
    ],
)
def test_deep_pictures_look_as_those_of_8_bits(values: NDArray[Any], given: tuple[float, float] | None, tmp_path: Path) -> None:
    tiff(tmp_path / "it.tif", values)
    found = decoded(tmp_path, Reading(given))
    assert np.abs(found["pixels"][0, ..., 0].astype(int) - SPOT * 255).max() <= (13 if values.max() == 3900 else 1.01)
    assert "1 images of more than 8 bits are shown by the range" in found["notes"][0]


def test_one_range_holds_for_a_whole_source_and_8_bits_stay(tmp_path: Path) -> None:
    for number, top in enumerate((900, 4095)):
        pillow(tmp_path / f"{number}.png", (SPOT * top).astype(np.uint16))
    pillow(tmp_path / "8.png", (SPOT * 90).astype(np.uint8))
    pixels = decoded(tmp_path)["pixels"]
    assert pixels.reshape(3, -1).max(1).tolist() == [56, 255, 90]
    told = (
        "2 images of more than 8 bits are shown by the range 0 (black) to 4095 (white), for values from 0 to 4095; "
        "1 of 8 bits stay as they are"
    )
    fix = ". To fix it, set gray_range, in the files' own values, and the same at all hospitals and the target"
    assert decoded(tmp_path)["notes"][0].startswith(told + fix)
    assert decoded(tmp_path, Reading((0, 4095)))["notes"].tolist() == [told]
    explicit = decoded(tmp_path, Reading((0, 900)))["pixels"]
    assert explicit.reshape(3, -1).max(1).tolist() == [255, 255, 90]


def test_a_range_that_nothing_needs_is_said(tmp_path: Path) -> None:
    pillow(tmp_path / "8.png", (SPOT * 90).astype(np.uint8))
    found = decoded(tmp_path, Reading((0, 90)))
    assert found["pixels"].max() == 90
    assert found["notes"].tolist() == ["no image has more than 8 bits, so that gray_range changes nothing"]


def test_what_is_white_is_white(tmp_path: Path) -> None:
    tiff(tmp_path / "0.tif", (SPOT * 4095).astype(np.uint16), photometric=0)
    tiff(tmp_path / "1.tif", (SPOT * 4095).astype(np.uint16))
    white, black = decoded(tmp_path)["pixels"].astype(int)
    assert np.array_equal(white, 255 - black)


def test_not_a_number_is_black(tmp_path: Path) -> None:
    values = SPOT.astype(np.float32)
    values[:, 0], values[:, 1], values[:, 2] = np.nan, np.inf, -np.inf
    tiff(tmp_path / "it.tif", values)
    assert decoded(tmp_path)["pixels"][0, 12, :3, 0].tolist() == [0, 255, 0]
    tiff(tmp_path / "never.tif", np.full_like(values, np.nan))
    assert decoded(tmp_path)["reasons"].tolist() == ["no finite value"]


@pytest.mark.parametrize("values", [BITS_12.astype(np.int16) - 1024, HALF, WIDE])
def test_values_without_a_natural_range_need_one(values: NDArray[Any], tmp_path: Path) -> None:
    tiff(tmp_path / "it.tif", values)
    error = refusal(tmp_path)
    for words in (
        "site 'x'",
        f"found 1 images with values from {values.min():g} to {values.max():g}",
        "Set gray_range: [black, white]",
    ):
        assert words in str(error)
    assert error.told.startswith("source.gray_range: found none")


@pytest.mark.parametrize(
    ("values", "given"),
    [
        (BITS_12, (0.0, 65535.0)),
        (BITS_12, (0.0, 3.0)),
        (BITS_12, (1e5, 1e6)),
        (np.where(SPOT == 1, 65535, BITS_12).astype(np.uint16), None),
        ((SPOT * 1.5).astype(np.float32), None),
        (BITS_12 % 4, None),
    ],
)
def test_a_range_that_leaves_few_gray_levels_is_refused(
    values: NDArray[Any], given: tuple[float, float] | None, tmp_path: Path
) -> None:
    tiff(tmp_path / "patient-0815.tif", values)
    error = refusal(tmp_path, Reading(given))
    assert "found 1 images of 24 gray levels or fewer by the range" in str(error)
    assert "patient-0815.tif" in str(error)


def test_a_few_empty_pictures_are_no_error(tmp_path: Path) -> None:
    for number in range(3):
        pillow(tmp_path / f"{number}.png", BITS_12)
    pillow(tmp_path / "black.png", np.zeros((SIDE, SIDE), np.uint16))
    assert len(decoded(tmp_path)["notes"]) == 1
    pillow(tmp_path / "noise.png", BITS_12 // 100)
    assert decoded(tmp_path)["notes"][1] == "of 1 of these images that range leaves 24 gray levels or fewer"


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_on_its_side_is_upright(compression: str, dtype: type, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    wide = (SPOT[:12] * 255).astype(dtype)
    pillow(tmp_path / "it.tif", wide, exif=turned, compression=None if compression == "raw" else compression)
    pillow(tmp_path / "it.png", wide, exif=turned)
    upright = Image.fromarray(np.rot90(wide, 3).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    for pixels in decoded(tmp_path)["pixels"]:
        assert np.array_equal(pixels[..., 0], upright)


CUT_OUT = np.full((SIDE, SIDE, 4), (200, 60, 30, 255), np.uint8)
CUT_OUT[:, : SIDE // 2] = (255, 0, 255, 0)
"""Magenta where nothing is to be seen."""


def _levels(path: Path, bits: int) -> None:
    """A gray PNG of few bits, whose brightest level is transparent."""
    pixels = np.repeat(np.where(CUT_OUT[..., 3] > 0, 0, 2**bits - 1).astype(np.uint8), 1, 1)
    file = Image.fromarray(pixels).convert("P")
    file.putpalette([level for gray in range(2**bits) for level in [gray] * 3])
    file.save(path, bits=bits, transparency=2**bits - 1)


CLEAR: dict[str, Any] = {
    "rgba.png": lambda path: Image.fromarray(CUT_OUT).save(path),
    "rgba.tif": lambda path: Image.fromarray(CUT_OUT).save(path),
    "rgba.webp": lambda path: Image.fromarray(CUT_OUT).save(path, lossless=True, exact=True),
    "rgba.tga": lambda path: Image.fromarray(CUT_OUT).save(path),
    "la.png": lambda path: Image.fromarray(CUT_OUT).convert("LA").save(path),
    "palette.png": lambda path: Image.fromarray(CUT_OUT).quantize(8).save(path),
    "palette.gif": lambda path: Image.fromarray(CUT_OUT).save(path),
    "pa.tif": lambda path: Image.fromarray(CUT_OUT).quantize(8).convert("PA").save(path),
    "color.png": lambda path: Image.fromarray(CUT_OUT[..., :3]).save(path, transparency=(255, 0, 255)),
    "level.png": lambda path: Image.fromarray(CUT_OUT[..., 0]).save(path, transparency=255),
    "one-bit.png": lambda path: Image.fromarray(CUT_OUT[..., 3] == 0).save(path, transparency=1),
    "two-bits.png": lambda path: _levels(path, 2),
    "deep.png": lambda path: png(path, CUT_OUT.astype(np.uint16) * 257, 6),
    "deep-gray.png": lambda path: png(path, CUT_OUT[..., [0, 3]].astype(np.uint16) * 257, 4),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CLEAR)
def test_transparent_pixels_show_the_background(name: str, channels: int, tmp_path: Path) -> None:
    CLEAR[name](tmp_path / name)
    for background, level in (("black", 0), ("white", 255)):
        found = decoded(tmp_path, Reading((0, 65535) if "deep" in name else None, background), Geometry(SIDE, channels))
        pixels = found["pixels"][0]
        assert np.unique(pixels[:, : SIDE // 2 - 2]).tolist() == [level]
        assert f"1 images with transparency are shown on {background} (background)" in found["notes"]
    if "rgba" in name or name == "deep.png":
        visible = Image.fromarray(CUT_OUT[..., :3]).convert("L" if channels == 1 else "RGB")
        assert np.array_equal(pixels[12, -1], np.atleast_1d(np.asarray(visible)[12, -1]))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_opaque_pictures_of_8_bits_are_as_pillow_shows_them(mode: str, channels: int, tmp_path: Path) -> None:
    picture = Image.fromarray((COLOR_12 >> 4).astype(np.uint8)).convert(mode)
    file = tmp_path / ("it.jpg" if mode in ("CMYK", "YCbCr") else "it.png")
    picture.save(file)
    with Image.open(file) as again:
        shown = again.convert("L" if channels == 1 else "RGB").resize((16, 16), Image.Resampling.BICUBIC)
    pixels, transparent = pixels_of(read(file), Geometry(16, channels), Reading())
    assert np.array_equal(pixels, np.asarray(shown).reshape(16, 16, channels))
    assert not transparent


@pytest.mark.parametrize("name", ["stack.tif", "film.gif", "film.png", "film.webp"])
def test_pages_are_named_and_can_be_chosen(name: str, tmp_path: Path) -> None:
    first, *others = (Image.fromarray(np.full((SIDE, SIDE), level, np.uint8)) for level in (40, 100, 200))
    first.save(tmp_path / name, save_all=True, append_images=others, **({"lossless": True} if "webp" in name else {}))
    found = decoded(tmp_path)
    assert np.unique(found["pixels"]).tolist() == [40]
    assert found["notes"].tolist() == ["1 files hold several pages or frames, up to 3: page 1 of each is read, and no other (page)"]
    assert np.unique(decoded(tmp_path, Reading(page=3))["pixels"]).tolist() == [200]
    error = refusal(tmp_path, Reading(page=4))
    assert f"{name} (3 pages, and no page 4)" in str(error)
    first.save(tmp_path / "single.png")
    assert np.unique(decoded(tmp_path, Reading(page=2))["pixels"]).tolist() == [40, 100]


def test_pages_of_deep_stacks_and_pictures_with_a_preview(tmp_path: Path) -> None:
    first, second = (Image.fromarray((SPOT * top).astype(np.uint16)) for top in (1000, 4095))
    first.save(tmp_path / "stack.tif", save_all=True, append_images=[second])
    assert decoded(tmp_path, Reading(page=2))["pixels"].max() == 255
    photo = Image.fromarray((COLOR_12 >> 4).astype(np.uint8))
    photo.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[photo])
    assert read(tmp_path / "photo.jpg").pages == 1


def test_the_limit_on_pixels_is_told_as_one_and_can_be_moved(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    pillow(tmp_path / "slide.png", (SPOT * 255).astype(np.uint8))
    assert "slide.png (24 x 24 = 576 pixels)" in str(refusal(tmp_path, Reading(max_pixels=575)))
    assert len(decoded(tmp_path, Reading(max_pixels=576))["pixels"]) == 1
    file = (tmp_path / "slide.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 14_000, 14_000) + file[24:29]
    (tmp_path / "slide.png").write_bytes(file[:12] + header + struct.pack(">I", zlib.crc32(header)) + file[33:])
    error = refusal(tmp_path)
    assert "found 1 images of more pixels than max_pixels (178956970): slide.png (14000 x 14000 = 196000000 pixels)" in str(error)
    assert "raise max_pixels" in error.told
    assert not recwarn.list
    assert Image.MAX_IMAGE_PIXELS is not None


def test_what_pillow_cannot_read_is_told_by_its_kind(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif", HALF.astype(np.float64))
    (tmp_path / "b.dcm").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "c.png").write_text("no image")
    kinds = ["a TIFF of a kind that Pillow cannot read", "DICOM", "no image"]
    assert [reason.startswith(kind) for reason, kind in zip(decoded(tmp_path)["reasons"], kinds, strict=True)] == [True] * 3


@pytest.mark.parametrize("name", [*DEEP, *CLEAR, "photo.avif"])
def test_damaged_files_are_named_and_nothing_else_happens(name: str, tmp_path: Path) -> None:
    if name in DEEP:
        DEEP[name][0](tmp_path / name, DEEP[name][1])
    elif name in CLEAR:
        CLEAR[name](tmp_path / name)
    elif features.check("avif"):
        Image.fromarray(CUT_OUT).save(tmp_path / name)
    else:
        pytest.skip("this Pillow reads no AVIF")
    whole, rng = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    for trial in range(24):
        damaged = bytearray(whole[: len(whole) * (trial + 1) // 24])
        for at in rng.integers(0, min(len(damaged), 200), 3) if trial % 2 else []:
            damaged[at] = rng.integers(256)
        (tmp_path / name).write_bytes(damaged)
        with suppress(DataError):  # values and sizes that damage made up
            found = decode_all(tmp_path, [name], GRAY, Reading((-3000, 65535)), "x", Rows())
            assert len(found["good"]) + len(found["broken"]) == 1


def test_a_file_that_has_vanished_is_not_broken(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        decode_all(tmp_path, ["0815.png", "0816.png"], GRAY, Reading(), "x", Rows())
    assert "found 2 files that cannot be read: 0815.png (No such file or directory); 0816.png (" in str(error.value)
    assert error.value.told.startswith("source.root: found files that cannot be read")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for a file that fails when it is read")
def test_what_could_not_be_read_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    for label in ("a", "b"):
        (tmp_path / "album" / "ward" / label).mkdir(parents=True)
        pillow(tmp_path / "album" / "ward" / label / "0.png", (SPOT * 255).astype(np.uint8))
    failing = tmp_path / "album" / "ward" / "a" / "1.png"
    failing.symlink_to("/proc/self/mem")
    source = ImageFolder(root=str(tmp_path / "album"), max_broken=9)
    with pytest.raises(DataError, match=r"found 1 files that cannot be read: ward/a/1\.png \(Input/output error\)"):
        source.load(GRAY, "x", 0)
    assert not list(tmp_path.glob("cache/**/*.npz"))
    failing.unlink()
    assert len(source.load(GRAY, "x", 0)) == 2


def test_the_way_of_reading_is_part_of_what_determines_images(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "ward" / label).mkdir(parents=True)
        pillow(tmp_path / "ward" / label / "0.png", (SPOT * 4095).astype(np.uint16))
    ways: list[dict[str, Any]] = [{}, {"gray_range": [0, 8000]}, {"background": "white"}, {"page": 1}]
    sources = [ImageFolder(root=str(tmp_path), **way) for way in ways]
    assert len({source.identity("x", 0) for source in sources}) == 4
    assert [int(source.load(GRAY, "x", 0).pixels.max()) for source in sources] == [255, 131, 255, 255]
    with pytest.raises(ValueError, match="black below white"):
        ImageFolder(root=str(tmp_path), gray_range=(9, 1))


def test_processes_see_what_one_process_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many files of every kind: plain, deep, transparent, in pages, broken."""
    rng = np.random.default_rng(0)
    for number in range(MANY):
        gray = rng.integers(0, 4096, (9, 8), np.uint16)
        if number % 7 == 0:
            Image.fromarray(gray).save(tmp_path / f"{number}.png")
        elif number % 11 == 0:
            Image.fromarray(np.dstack([gray >> 4] * 4).astype(np.uint8)).save(tmp_path / f"{number}.png")
        elif number % 50 == 1:
            (tmp_path / f"{number}.png").write_bytes(b"nothing")
        elif number % 50 == 2:
            pages = [Image.fromarray((gray >> 4).astype(np.uint8))] * 2
            pages[0].save(tmp_path / f"{number}.tif", save_all=True, append_images=pages[1:])
        else:
            Image.fromarray((gray >> 4).astype(np.uint8)).save(tmp_path / f"{number}.png")
    several = decoded(tmp_path)
    monkeypatch.setattr(_decode, "MANY", MANY + 1)
    alone = decoded(tmp_path)
    assert several.keys() == alone.keys() and len(several["notes"]) == 3 and len(several["broken"]) == 6
    assert all(np.array_equal(several[name], alone[name]) for name in alone)
