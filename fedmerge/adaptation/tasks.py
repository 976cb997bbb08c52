"""What the target is given and what it tells: plain records that travel between processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.federated.model import ModelSpec
from fedmerge.federated.site import Site
from fedmerge.merging.methods._base import Method
from fedmerge.merging.per_sample.dispatch import Way
from fedmerge.merging.predict import RowInfo
from fedmerge.report.records import StreamFacts
from fedmerge.stream.schedules._base import Schedule

Arrays = dict[str, NDArray[Any]]

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Federated:
    """A global model as it reaches the target, and what the table says of it."""

    key: str
    paper: str
    hyper_parameters: dict[str, Any]
    remark: str
    weights: Arrays


@dataclass(frozen=True)
class TargetTask:
    """The unseen hospital, the model, the order of its images, and the methods to compare. threads: for torch.

    per_sample: how rows of coefficients are merged. shared_head: whether all experts started from one head. generalist: the
    scenario's own, as a state, or None. experts: all that are there at some time, in order; those at hand if none are named.
    federated: models that strategies have made in rounds; each is a row. cap: largest coefficient of an expert in an adaptive
    merge, or None. max_bytes: memory that the target may take; experts that exceed it stay on its disk.
    precision: of experts' weights, and of forwards. shards: processes over
    which the experts are spread; 1 is the target's own. gpus: of the target's actor, or None for one if there is one. resource:
    Ray's name for the machine that it must be on, or None.
    """

    site: Site
    model: ModelSpec
    classes: tuple[str, ...]
    schedule: Schedule
    methods: tuple[Method, ...]
    seed: int
    threads: int
    per_sample: Way = "auto"
    shared_head: bool = True
    generalist: Arrays | None = None
    experts: tuple[str, ...] = ()
    federated: tuple[Federated, ...] = ()
    cap: float | None = None
    max_bytes: int | None = None
    precision: Precision = "float32"
    shards: int = 1
    gpus: float | None = None
    resource: str | None = None


@dataclass(frozen=True)
class Contribution:
    """One expert as it reaches the target: its state as numpy arrays, and what its site declared. statistics: by kind."""

    site: str
    weights: Arrays
    n: int | None
    temperature: float
    statistics: dict[str, Arrays] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """The stream and the target, without images or labels.

    shown: images that the target's site file agrees to show, uint8 (n, H, W, C), or None.
    bank: where the experts' rows are, and their bytes.
    """

    stream: StreamFacts
    shown: NDArray[np.uint8] | None
    device: str
    rows: dict[str, RowInfo]
    bank: dict[str, Any] = field(default_factory=dict)


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Copies: what comes from shared memory must not be written to."""
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
