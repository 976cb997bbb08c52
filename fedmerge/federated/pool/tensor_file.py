"""Arrays on disk: our own with their digest, so that what comes out is what went in, and weights from a user's file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from torch import Tensor

from fedmerge.errors import CheckpointError, FolderError
from fedmerge.federated.model import ModelSpec, build
from fedmerge.federated.security.audit import state_digest
from fedmerge.merging.bank.layout import check_state
from fedmerge.system.files import atomic

State = dict[str, Tensor]


def put(file: Path, state: State, *, digest: str = "", **words: str) -> None:
    """Write a safetensors file, whole or not at all, with the digests of its arrays (`digest` if known) and of the words."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: tensor.contiguous() for name, tensor in state.items()}
    with atomic(file) as draft:
        save_file(arrays, draft, {"digests": f"{digest or state_digest(state)} {_digest(words)}", **words})


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
        raise FolderError(f"{file}: this user may not read it ({error.strerror}); ask its owner for the right to") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise FolderError(f"{file}: cannot be read ({error}); {mend}") from None
    return state, words, digest


def _digest(words: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def read_tensors(path: str | Path, key: str, model: ModelSpec) -> dict[str, Tensor]:
    """All tensors of a safetensors file; its path may name environment variables. Raises CheckpointError, naming the key."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(os.path.expandvars(path)).expanduser()
    expected = f"expected a safetensors file of {model.name}"
    try:
        with file.open("rb") as opened:  # safetensors says "no such file" of one that may not be read
            head = opened.read(512)
    except IsADirectoryError:
        inside = sorted(item.name for item in file.glob("*.safetensors"))[:3]
        mend = f"Name one in it: {', '.join(inside)}" if inside else "Name the file"
        raise CheckpointError(f"{key}: {file}: found a folder; {expected}. {mend}") from None
    except OSError as error:
        where = "" if file.is_absolute() else f" in {Path.cwd()}"
        raise CheckpointError(f"{key}: {file}{where}: {error.strerror}; {expected}") from None
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError) as error:
        said = _kind_of(head) or f"{error}, as of a file that was cut off or damaged"
        raise CheckpointError(f"{key}: {file}: found {said}; {expected}") from None


CONVERT = "convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')"

KINDS = {
    b"version https://git-lfs": "a pointer of Git LFS in place of the file: fetch it with 'git lfs pull'",
    b"PK\x03\x04": f"a zip, as PyTorch writes .pth, .pt and .bin: {CONVERT}",
    b"\x80": f"a pickle, as PyTorch wrote .pth once: {CONVERT}",
    b"<": "a page of HTML or XML, as a server sends it in place of a file that one has to log in for",
    b"\x89HDF": "an HDF5 file, as Keras writes it: no weights of timm",
    b"\x93NUMPY": "an array of NumPy",
    b"GGUF": "a GGUF file: no weights of timm",
    b"\x1f\x8b": "a file packed with gzip: unpack it",
}
"""What a file begins with that is taken for weights, and what it is."""


def _kind_of(head: bytes) -> str:
    """What a file is that is no safetensors file, by its first bytes."""
    if not head:
        return "an empty file"
    return next((said for begins, said in KINDS.items() if head.startswith(begins)), "")


def read_state(path: str | Path, key: str, model: ModelSpec, classes: int) -> dict[str, Tensor]:
    """A whole state that fits the model and its classes. Raises CheckpointError, naming the key and every difference."""
    found = read_tensors(path, key, model)
    check_state(found, build(model, classes).state_dict(), f"{key}: {Path(path).name}")
    return found
