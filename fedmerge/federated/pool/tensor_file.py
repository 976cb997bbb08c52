"""Arrays on disk: our own with their digest, so that what comes out is what went in, and what a user's file is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from pathlib import Path

from fedmerge.errors import CheckpointError, FolderError
from fedmerge.federated.security.audit import state_digest
from fedmerge.federated.statistics._base import State
from fedmerge.system.files import at_home, atomic


def save(file: Path, state: State, words: dict[str, str] | None = None) -> None:
    """Write a safetensors file, in place. Raises OSError, which safetensors tells in words alone."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, words)
    except SafetensorError as error:
        if not (number := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from None


def put(file: Path, state: State, *, digest: str = "", **words: str) -> None:
    """Write a safetensors file, whole or not at all, with the digests of its arrays (`digest` if known) and of the words."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic(file) as draft:
        save(draft, state, {"digests": f"{digest or state_digest(state)} {_digest(words)}", **words})


def take(file: Path, mend: str) -> tuple[State, dict[str, str], str]:
    """Arrays, words and the arrays' digest, verified. Raises FolderError with `mend` if they were changed, or torn; and where this
    user may not read them."""
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb"):  # safetensors says "no such file" of one that may not be read
            pass
        with safe_open(file, "pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            words = dict(opened.metadata() or {})
        digest = state_digest(state)
        if words.pop("digests", None) != f"{digest} {_digest(words)}":
            raise ValueError("its digest differs")
    except PermissionError as error:
        raise FolderError(
            f"{file}: found a file that this user may not read ({error.strerror}); expected the right to. Ask its owner"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise FolderError(
            f"{file}: found a file that cannot be read ({error}); expected a whole one. {mend[:1].upper()}{mend[1:]}"
        ) from None
    return state, words, digest


def _digest(words: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def opened_file(path: str | Path, key: str, expected: str) -> tuple[Path, bytes]:
    """A file of weights, found, and its first bytes. Raises CheckpointError, naming the key."""
    file = at_home(path)
    try:
        if file.exists() and not (file.is_file() or file.is_dir()):  # a pipe would be waited for
            raise CheckpointError(f"{key}: {file}: found a pipe or a device; {expected}")
        with file.open("rb") as opened:  # safetensors says "no such file" of one that may not be read
            head = opened.read(512)
    except IsADirectoryError:
        inside = sorted(item.name for item in file.glob("*.safetensors"))[:3]
        mend = f"Name one in it: {', '.join(inside)}" if inside else "Name the file"
        raise CheckpointError(f"{key}: {file}: found a folder; {expected}. {mend}") from None
    except OSError as error:
        where = "" if file.is_absolute() else f" in {Path.cwd()}"
        raise CheckpointError(f"{key}: {file}{where}: found nothing that can be opened ({error.strerror}); {expected}") from None
    return file, head


def read_safetensors(file: Path, head: bytes, key: str, expected: str) -> State:
    """All tensors of a file that begins so. Raises CheckpointError that says what else the file is."""
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        return dict(load_file(file) if _in_utf8(file) else load(file.read_bytes()))
    except (OSError, SafetensorError) as error:
        said = kind_of(file, head) or f"a damaged file ({error})"
        raise CheckpointError(f"{key}: {file}: found {said}; {expected}") from None


def _in_utf8(file: Path) -> bool:
    """Whether safetensors can open a file by its name."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return False
    return True


KINDS = {
    b"version https://git-lfs": "a pointer of Git LFS in place of the file: fetch it with 'git lfs pull'",
    b"\x80": "a pickle, as PyTorch wrote .pth once",
    b"\x89HDF": "an HDF5 file, as Keras writes it: no weights of timm",
    b"\x93NUMPY": "an array of NumPy",
    b"GGUF": "a GGUF file: no weights of timm",
    b"\x1f\x8b": "a file packed with gzip: unpack it",
}
"""What a file begins with that is taken for weights, and what it is."""


def kind_of(file: Path, head: bytes) -> str:
    """What a file is that is no safetensors file, by its first bytes and its size; empty if that cannot be told."""
    if not head:
        return "an empty file"
    if known := next((said for begins, said in KINDS.items() if head.startswith(begins)), ""):
        return known
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(file)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        return "a page of HTML or XML, as a server sends it in place of a file that one has to log in for"
    if text.isascii() and text.decode("ascii").replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
        return f"a file of text that begins with {text[:40].decode('ascii')!r}"
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b":", b"\x1a"):
        return "an ONNX model: no weights of timm"
    if head[4:8] == b"TFL3":
        return "a TFLite model: no weights of timm"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    size, header = file.stat().st_size, int.from_bytes(head[:8].ljust(8, b"\0"), "little")
    if size < 8 or (head[8:9] == b"{" and size < 8 + header):
        return f"a file that was cut off after {size} bytes: copy it again"
    return _too_short(file, header) if head[8:9] == b"{" else "no weights that are known here, by its first bytes"


def _too_short(file: Path, header: int) -> str:
    """A safetensors file whose arrays are not all there, or with more behind them; empty for another fault."""
    try:
        with file.open("rb") as opened:
            arrays = json.loads(opened.read(8 + header)[8:])
        whole = 8 + header + max(one["data_offsets"][1] for name, one in arrays.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, IndexError):
        return ""
    size = file.stat().st_size
    return f"{size} bytes of a file that says it has {whole}: copy it again" if size != whole else ""


HALF_SAVED = "{}, as where saving failed, such as that of tensors on the device 'meta': save it again"
"""Of a zip of PyTorch that is whole as a zip, and what it lacks."""


def _kind_of_zip(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as opened:
            names = opened.namelist()
    except zipfile.BadZipFile:
        return "a zip that was cut off, as PyTorch writes .pth, .pt and .bin: copy it again"
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return "a zip, as PyTorch writes .pth, .pt and .bin"
    if any(name.endswith(".npy") for name in names):
        return "arrays of NumPy (.npz)"
    if any(name.endswith("/.data/serialization_id") for name in names):
        return f"a zip of PyTorch that lacks {HALF_SAVED.format('data.pkl')}"
    return f"a zip of {', '.join(names[:3])}: unpack it"
