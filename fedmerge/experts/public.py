"""Public images that the coordinator may look at: those of a proxy initialisation, or those that a scenario names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedmerge.data.images import to_batch
from fedmerge.data.shift import Scanner
from fedmerge.experts.backbone import ModelSpec, normalisation
from fedmerge.experts.defence import Probe
from fedmerge.experts.initialisation import PUBLIC, Checkpoint, Pretrained, Proxy
from fedmerge.seeds import generator

PROBES = 512
"""Public images that experts are compared on."""


def probe_of(
    initialisation: Pretrained | Checkpoint | Proxy, named: Any, model: ModelSpec, classes: Sequence[str], seed: int
) -> Probe | None:
    """A draw of public images, or None if there are none. named: a source of the scenario's own. classes: the hospitals'.

    Raises DataError.
    """
    if named is not None:
        source, scanner = named, Scanner(noise=0.05)
    elif isinstance(initialisation, Proxy):
        source, scanner = initialisation.source, initialisation.scanner
    else:
        return None
    raw = source.load(model.geometry, PUBLIC, seed)
    chosen = np.sort(generator(seed, "probe").permutation(len(raw))[:PROBES])
    images = scanner.scan(raw.subset(chosen), PUBLIC, seed)
    mean, std = normalisation(model)

    def batch(pixels: np.ndarray) -> torch.Tensor:
        return to_batch(pixels, mean, std)

    return Probe(images.pixels, batch, familiar=set(classes) <= set(source.classes()))
