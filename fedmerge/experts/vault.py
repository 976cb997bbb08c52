"""Arrays on disk with their own digest: what comes out is what went in, or there is an error."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from torch import Tensor

from fedmerge.errors import FolderError
from fedmerge.experts.upload import state_digest

State = dict[str, Tensor]
OLD = {"sha256", "audit"}
"""Words in files of a time when only arrays had a digest, or nothing had."""


def put(file: Path, state: State, **words: str) -> None:
    """Write a safetensors file, whole or not at all, with the digests of its arrays and of the words beside them."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}.draft")
    arrays = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(arrays, draft, {"digests": f"{state_digest(state)} {_digest(words)}", **words})
    draft.replace(file)


def take(file: Path, mend: str) -> tuple[State, dict[str, str]]:
    """Arrays and words of a file, verified; files of older versions by as much as they have.

    Raises FolderError with `mend` if it cannot be read or is not what was written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            words = dict(opened.metadata() or {})
        digests = words.pop("digests", None)
        if digests is None and set(words) <= OLD:  # written by an older version
            digests = f"{words.pop('sha256', state_digest(state))} {_digest(words)}"
        if digests != f"{state_digest(state)} {_digest(words)}":
            raise ValueError("its digest differs")
    except (OSError, ValueError, SafetensorError) as error:
        raise FolderError(f"{file}: cannot be read ({error}); {mend}") from None
    return state, words


def _digest(words: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
