"""Weights from a user's file."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from fedmerge.errors import CheckpointError
from fedmerge.experts.backbone import ModelSpec, build
from fedmerge.merge.parts import check_state


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
