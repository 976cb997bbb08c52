"""A marked image, and a search for it in whatever form bytes may carry it."""

from __future__ import annotations

import base64
import functools
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ZLIB = re.compile(rb"\x78[\x01\x5e\x9c\xda]")
BASE64 = re.compile(rb"[A-Za-z0-9+/]{40,}={0,2}")
URL = re.compile(rb"[A-Za-z0-9_-]{40,}={0,2}")
PICTURE = re.compile(rb"\x89PNG\r\n|\xff\xd8\xff|GIF8|RIFF....WEBP", re.DOTALL)
HEX = re.compile(rb"(?:[0-9a-fA-F]{2}){20,}")
DEEPEST = 4
"""Wrappings within wrappings that are opened."""


class Canary:
    """A gray image whose every row is found nowhere else, (side, side) uint8. name: of its file, which is a secret, too."""

    def __init__(self, seed: int, side: int = 16) -> None:
        self.pixels: NDArray[np.uint8] = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
        self.name = f"patient-{seed}-{self.pixels[0, :4].tobytes().hex()}"
        self.file = b""

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.pixels).save(folder / f"{self.name}.png")
        self.file = (folder / f"{self.name}.png").read_bytes()

    def needles(self) -> dict[str, bytes]:
        """Bytes by which it is known: single rows as stored, mirrored, scaled or normalized, the file's inside, its name."""
        found = {"its file's name": self.name.encode()}
        if self.file:
            found["its file"] = self.file[48:80]
        for number in (3, 11):
            row = self.pixels[number]
            shown = {"": row, "mirrored ": row[::-1], "column ": self.pixels[:, number]}
            for how, values in shown.items():
                x = values.astype(np.float32) / np.float32(255)
                found[f"{how}{number} as uint8"] = values.tobytes()
                found[f"{how}{number} as int64"] = values.astype(np.int64).tobytes()
                found[f"{how}{number} as text"] = re.sub(r"[^\d,]", "", ", ".join(map(str, values))).encode()
                for scale, y in {"255ths": x, "normalized": (x - np.float32(0.5)) / np.float32(0.5), "raw": x * 255}.items():
                    for kind in (np.float16, np.float32, np.float64):
                        found[f"{how}{number}, {scale}, as {np.dtype(kind)}"] = y.astype(kind).tobytes()
        return found

    def in_bytes(self, data: bytes) -> set[str]:
        """The forms in which `data`, or anything wrapped in it, holds the image."""
        wanted = self.needles()
        found: set[str] = set()
        for piece in unwrapped(data):
            squeezed = re.sub(rb"[\s\[\]()]", b"", piece) if b"," in piece else b""
            found |= {what for what, needle in wanted.items() if needle in piece or ("text" in what and needle in squeezed)}
            if self._pictured(piece):
                found.add("a picture of it")
        return found

    def in_folder(self, folder: Path) -> dict[str, set[str]]:
        """What of it is in the files below a folder, and in their names; by path."""
        found: dict[str, set[str]] = {}
        for path in sorted(folder.rglob("*")):
            here = {"its file's name"} if self.name in path.name else set()
            if path.is_file() and not path.is_symlink():
                here |= self.in_bytes(path.read_bytes())
            if here:
                found[str(path.relative_to(folder))] = here
        return found

    def _pictured(self, piece: bytes) -> bool:
        """Whether an image in the piece shows it, at whatever size."""
        for match in PICTURE.finditer(piece):
            try:
                with Image.open(io.BytesIO(piece[match.start() :])) as image:
                    small = np.asarray(image.convert("L").resize(self.pixels.shape, Image.Resampling.BOX), np.float64)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                continue
            if small.std() > 0 and np.corrcoef(small.ravel(), self.pixels.ravel())[0, 1] > 0.9:
                return True
        return False


@functools.cache
def unwrapped(data: bytes) -> tuple[bytes, ...]:
    """The bytes and all that is wrapped in them, every piece once."""
    return tuple(dict.fromkeys(_unwrapped(data, 0)))


def _unwrapped(data: bytes, depth: int) -> Iterator[bytes]:
    """The bytes, and what unpacks from them: zip members, zlib and gzip streams anywhere in them, base64 and hexadecimal runs."""
    yield data
    if depth == DEEPEST:
        return
    inner: list[bytes] = []
    if b"PK\x03\x04" in data:
        try:
            with zipfile.ZipFile(io.BytesIO(data[data.index(b"PK\x03\x04") :])) as packed:
                inner += [packed.read(name) for name in packed.namelist()]
        except zipfile.BadZipFile:
            pass
    inner += [_inflated(data[match.start() :], zlib.MAX_WBITS) for match in ZLIB.finditer(data)]
    inner += [_inflated(data[match.start() :], 16 + zlib.MAX_WBITS) for match in re.finditer(rb"\x1f\x8b\x08", data)]
    for match in {*BASE64.findall(data), *URL.findall(data)}:
        whole = match.rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
        for start in range(4):  # what stood before it may look like a part of it
            text = whole[start:]
            inner.append(base64.b64decode(text[: len(text) - (len(text) % 4 == 1)] + b"=" * (-len(text) % 4)))
    inner += [bytes.fromhex(match.decode()) for match in HEX.findall(data)]
    for piece in inner:
        if len(piece) > 15:
            yield from _unwrapped(piece, depth + 1)


def _inflated(data: bytes, bits: int) -> bytes:
    try:
        return zlib.decompressobj(bits).decompress(data, 2**24)
    except zlib.error:
        return b""
