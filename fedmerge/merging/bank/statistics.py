"""What sites may upload beside weights, for the methods that need it: flat rows beside the experts', or matrices by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmerge.errors import CheckpointError
from fedmerge.merging.bank.layout import StateDict

FLAT = ("fisher", "soup")
"""Kinds with one tensor for each parameter, of the parameter's shape."""

BY_LAYER = ("gram", "gram_rounds")
"""Kinds with one (d, d) matrix for each linear weight (outputs, d)."""


class Statistics:
    """Statistics of K experts. fisher, soup: (K, P). gram, gram_rounds: weight's name -> (K, d, d).

    Parameters
    ----------
    names : Sequence[str]
        The experts', K of them.
    slices : Mapping[str, slice]
        Parameter's name -> its columns of theta.
    """

    def __init__(self, names: Sequence[str], slices: Mapping[str, slice]) -> None:
        self._names, self._slices = tuple(names), dict(slices)
        self._flat: dict[str, Tensor] = {}
        self._layers: dict[str, dict[str, Tensor]] = {}

    def add(self, kind: str, given: Sequence[StateDict], like: Tensor) -> None:
        """Keep one mapping of tensors for each expert, in their order. Raises CheckpointError if something is missing."""
        if kind not in (*FLAT, *BY_LAYER):
            raise CheckpointError(f"statistics: found '{kind}'; expected some of {', '.join((*FLAT, *BY_LAYER))}")
        if len(given) != len(self._names):
            raise CheckpointError(f"statistic '{kind}': found {len(given)}; expected {len(self._names)}, one for each expert")
        if kind in FLAT:
            self._flat[kind] = torch.stack([self._row(kind, name, one, like) for name, one in zip(self._names, given, strict=True)])
        else:
            layers = given[0].keys()
            for name, one in zip(self._names, given, strict=True):
                if odd := sorted(set(one) ^ set(layers) | set(one) - set(self._slices)):
                    raise CheckpointError(
                        f"statistic '{kind}' of {name}: found a difference at {odd[0]}; expected one matrix for each linear weight"
                    )
            self._layers[kind] = {layer: torch.stack([one[layer].to(like.device) for one in given]) for layer in layers}

    def flat(self, kind: str, method: str) -> Tensor:
        """(K, P). Raises CheckpointError, naming the method and what to add, if the sites did not upload it."""
        if kind not in self._flat:
            raise CheckpointError(_missing(kind, method))
        return self._flat[kind]

    def layers(self, kind: str, method: str) -> dict[str, Tensor]:
        """Weight's name -> (K, d, d). Raises CheckpointError as `flat` does."""
        if kind not in self._layers:
            raise CheckpointError(_missing(kind, method))
        return self._layers[kind]

    def _row(self, kind: str, name: str, one: StateDict, like: Tensor) -> Tensor:
        missing = sorted(set(self._slices) - set(one))
        if missing:
            raise CheckpointError(
                f"statistic '{kind}' of {name}: found nothing for {missing[0]}; expected it for all ({len(missing)} are missing)"
            )
        return torch.cat([one[parameter].reshape(-1) for parameter in self._slices]).to(like)


def _missing(kind: str, method: str) -> str:
    return (
        f"{method}: needs the statistic '{kind}' of every site, and there is none; add '{kind}' to the scenario's uploads "
        f"(uploads: [{kind}]), or as a library Bank.of(..., statistics={{'{kind}': [...]}})"
    )
