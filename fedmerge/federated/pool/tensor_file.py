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
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{key}: {file}: {error}; expected a safetensors file of {model.name}") from None


def read_state(path: str | Path, key: str, model: ModelSpec, classes: int) -> dict[str, Tensor]:
    """A whole state that fits the model and its classes. Raises CheckpointError, naming the key and every difference."""
    found = read_tensors(path, key, model)
    check_state(found, build(model, classes).state_dict(), f"{key}: {Path(path).name}")
    return found
