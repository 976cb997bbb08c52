"""What sites may upload beside weights, for the methods that need it: flat rows beside the experts', or matrices by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fedmerge.errors import CheckpointError
from fedmerge.merging.bank.layout import StateDict

FLAT = ("fisher", "soup")
"""Kinds with one tensor for each parameter, of the parameter's shape."""

BY_LAYER = ("gram", "gram_rounds")
"""Kinds with one (d, d) matrix for each linear weight (outputs, d)."""

VECTORS = ("centroid",)
"""Kinds with one tensor under their own name, of one length for all sites."""

KINDS = (*FLAT, *BY_LAYER, *VECTORS)
T = TypeVar("T")


class Statistics:
    """Statistics of K experts. fisher, soup: (K, P). gram, gram_rounds: weight's name -> (K, d, d). centroid: (K, D).

    Parameters
    ----------
    names : Sequence[str]
        The experts', K of them.
    slices : Mapping[str, slice]
        Parameter's name -> its columns of theta.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.statistics import Statistics
    >>> statistics = Statistics(["axial", "coronal"], {"weight": slice(0, 2)})
    >>> F = [{"weight": torch.tensor([3.0, 1.0])}, {"weight": torch.tensor([1.0, 1.0])}]
    >>> statistics.add("fisher", F, like=torch.zeros(1))
    >>> statistics.flat("fisher", method="fisher")
    tensor([[3., 1.],
            [1., 1.]])
    """

    def __init__(self, names: Sequence[str], slices: Mapping[str, slice]) -> None:
        self._names, self._slices = tuple(names), dict(slices)
        self._rows: dict[str, Tensor] = {}
        self._layers: dict[str, dict[str, Tensor]] = {}

    def add(self, kind: str, given: Sequence[StateDict], like: Tensor) -> None:
        """Keep one mapping of tensors for each expert, in their order. Raises CheckpointError if something is missing."""
        if kind not in KINDS:
            raise CheckpointError(f"statistics: found '{kind}'; expected some of {', '.join(KINDS)}")
        if len(given) != len(self._names):
            raise CheckpointError(f"statistic '{kind}': found {len(given)}; expected {len(self._names)}, one for each expert")
        if kind in FLAT:
            self._rows[kind] = torch.stack([self._row(kind, name, one, like) for name, one in zip(self._names, given, strict=True)])
        elif kind in VECTORS:
            self._rows[kind] = torch.stack(self._same_length(kind, given)).to(like.device)
        else:
            layers = given[0].keys()
            for name, one in zip(self._names, given, strict=True):
                if odd := sorted(set(one) ^ set(layers) | set(one) - set(self._slices)):
                    raise CheckpointError(
                        f"statistic '{kind}' of {name}: found a difference at {odd[0]}; expected one matrix for each linear weight"
                    )
                for layer, matrix in one.items():
                    wanted = given[0][layer].shape
                    if matrix.ndim != 2 or len(set(matrix.shape)) > 1 or matrix.shape != wanted:
                        raise CheckpointError(
                            f"statistic '{kind}' of {name}: found {tuple(matrix.shape)} for {layer}; expected a square matrix, as "
                            "large as others'"
                        )
                    _finite(kind, name, matrix)
            self._layers[kind] = {layer: torch.stack([one[layer].to(like.device) for one in given]) for layer in layers}

    def flat(self, kind: str, method: str) -> Tensor:
        """(K, P). Raises CheckpointError, naming the method and what to add, if the sites did not upload it."""
        return _uploaded(self._rows, kind, method)

    def layers(self, kind: str, method: str) -> dict[str, Tensor]:
        """Weight's name -> (K, d, d). Raises CheckpointError as `flat` does."""
        return _uploaded(self._layers, kind, method)

    def vectors(self, kind: str, method: str) -> Tensor:
        """(K, D). Raises CheckpointError as `flat` does."""
        return _uploaded(self._rows, kind, method)

    def _same_length(self, kind: str, given: Sequence[StateDict]) -> list[Tensor]:
        wanted = given[0][kind].shape if kind in given[0] else None
        for name, one in zip(self._names, given, strict=True):
            if set(one) != {kind} or one[kind].ndim != 1 or one[kind].shape != wanted:
                found = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in one.items()) or "nothing"
                raise CheckpointError(
                    f"statistic '{kind}' of {name}: found {found}; expected one vector '{kind}', as long as others'"
                )
            _finite(kind, name, one[kind])
        return [one[kind] for one in given]

    def _row(self, kind: str, name: str, one: StateDict, like: Tensor) -> Tensor:
        missing = sorted(set(self._slices) - set(one))
        if missing:
            raise CheckpointError(
                f"statistic '{kind}' of {name}: found nothing for {missing[0]}; expected it for all ({len(missing)} are missing)"
            )
        for parameter, place in self._slices.items():
            if one[parameter].numel() != place.stop - place.start:
                found, expected = tuple(one[parameter].shape), f"{place.stop - place.start} numbers, one for each of its weights"
                raise CheckpointError(f"statistic '{kind}' of {name}: found {found} for {parameter}; expected {expected}")
        row = torch.cat([one[parameter].reshape(-1) for parameter in self._slices]).to(like)
        _finite(kind, name, row)
        if kind == "fisher" and bool((row < 0).any()):
            raise CheckpointError(f"statistic '{kind}' of {name}: found a negative number; expected means of squares, 0 or more")
        return row


def _finite(kind: str, name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"statistic '{kind}' of {name}: found NaN or infinity; expected finite numbers")


def _uploaded(kept: Mapping[str, T], kind: str, method: str) -> T:
    if kind not in kept:
        raise CheckpointError(
            f"{method}: needs the statistic '{kind}' of every site, and there is none; add '{kind}' to the scenario's uploads "
            f"(uploads: [{kind}]), or as a library Bank.of(..., statistics={{'{kind}': [...]}})"
        )
    return kept[kind]
