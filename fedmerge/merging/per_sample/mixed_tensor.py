"""A parameter that is another for every sample of the batch, w_i = sum_r lambda_ir w_r, as a tensor that any model can run with.

An operation that is linear in its parameters is done r times on the activations scaled by lambda_ir and summed before the next
nonlinearity, so that no w_i is ever built (Imam et al., T^3, 2025, has one merge for every image; the identity is ours). Where
that is more work than to merge this one layer (`merged_first`), and where an operation is not linear in a parameter (a clamped
scale, a standardized filter), the parameter is merged first, for every sample.
An operation that is not in this table is an error that names it and the parameter: never a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from fedmerge.errors import PerSampleRefused

TABLE: dict[str, Callable[[Any, Any, Any], Any]] = {}
"""Operation's name -> how it is done; filled by `mixed_operations`."""

PLAIN = {"size", "dim", "numel", "is_floating_point", "is_complex", "ndimension", "stride", "is_contiguous", "__len__"}
"""Questions about the shape alone."""


class Mixed(torch.Tensor):
    """A parameter that differs from sample to sample.

    Either pieces (R tensors of the parameter's shape) with weights (N, R), or merged (N, *shape).

    Attributes
    ----------
    pieces : list[Tensor]
        R tensors of the parameter's shape.
    weights : Tensor | None
        (N, R), or None.
    merged : Tensor | None
        (N, *shape), or None.
    owners : tuple[str, ...]
        Names of the parameters it comes from.
    used : set[str]
        Names of those that have been read.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.per_sample.mixed_tensor import Mixed
    >>> pieces, weights = [torch.zeros(2), torch.ones(2)], torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> bias = Mixed.linear(pieces, weights, owners=("bias",), used=set())
    >>> torch.zeros(2, 2) + bias  # each sample gets its own
    tensor([[0.1000, 0.1000],
            [0.8000, 0.8000]])
    >>> bias.weights
    tensor([[0.9000, 0.1000],
            [0.2000, 0.8000]])
    """

    pieces: list[Tensor]
    weights: Tensor | None
    merged: Tensor | None
    owners: tuple[str, ...]
    used: set[str]

    @staticmethod
    def linear(pieces: Sequence[Tensor], weights: Tensor, owners: tuple[str, ...], used: set[str]) -> Mixed:
        """sum_r weights_ir pieces_r for sample i, not computed."""
        made = _empty(pieces[0].shape, pieces[0].dtype)
        made.pieces, made.weights, made.merged, made.owners, made.used = list(pieces), weights, None, owners, used
        return made

    @staticmethod
    def computed(values: Tensor, owners: tuple[str, ...], used: set[str]) -> Mixed:
        """values (N, *shape), one for every sample."""
        made = _empty(values.shape[1:], values.dtype)
        made.pieces, made.weights, made.merged, made.owners, made.used = [], None, values, owners, used
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        """Whose parameter it is."""
        return f"Mixed({', '.join(self.owners)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            return _attribute(func, args[0])
        if name in PLAIN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = TABLE.get(name)
        if handler is not None:
            return handler(func, args, kwargs)
        return for_every_sample(func, name, args, kwargs)


def count(mixed: Mixed) -> int:
    """Samples of the batch.

    Parameters
    ----------
    mixed : Mixed
        A mixed parameter.

    Returns
    -------
    int
        N.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.per_sample.mixed_tensor import Mixed, count
    >>> pieces, weights = [torch.zeros(2), torch.ones(2)], torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> bias = Mixed.linear(pieces, weights, owners=("bias",), used=set())
    >>> count(bias)
    2
    """
    return len(mixed.merged if mixed.merged is not None else cast(Tensor, mixed.weights))


def per_sample(mixed: Mixed) -> Tensor:
    """The merged parameter of every sample: for small parameters, and where nothing else is exact.

    Parameters
    ----------
    mixed : Mixed
        A mixed parameter.

    Returns
    -------
    Tensor
        (N, *shape).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.per_sample.mixed_tensor import Mixed, per_sample
    >>> pieces, weights = [torch.zeros(2), torch.ones(2)], torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> bias = Mixed.linear(pieces, weights, owners=("bias",), used=set())
    >>> per_sample(bias)
    tensor([[0.1000, 0.1000],
            [0.8000, 0.8000]])
    """
    mixed.used.update(mixed.owners)
    if mixed.merged is not None:
        return mixed.merged
    assert mixed.weights is not None
    pieces = stacked(mixed.pieces).reshape(len(mixed.pieces), -1).to(mixed.weights.dtype)
    return (mixed.weights @ pieces).reshape(-1, *mixed.shape).to(mixed.pieces[0].dtype)


def stacked(pieces: list[Tensor]) -> Tensor:
    """Pieces as one tensor.

    Parameters
    ----------
    pieces : list[Tensor]
        R of one shape.

    Returns
    -------
    Tensor
        (R, *shape): a view where the pieces lie at equal distances, as rows of a bank do, else a copy.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.per_sample.mixed_tensor import stacked
    >>> rows = torch.arange(6.0).reshape(3, 2)
    >>> found = stacked([rows[0], rows[2]])
    >>> found, found.data_ptr() == rows.data_ptr()  # no copy
    (tensor([[0., 1.],
            [4., 5.]]), True)
    """
    first, steps = pieces[0], {b.storage_offset() - a.storage_offset() for a, b in pairwise(pieces)}
    together = len({piece.untyped_storage().data_ptr() for piece in pieces}) == 1
    if not together or len(steps) != 1 or min(steps) <= 0 or any(piece.stride() != first.stride() for piece in pieces):
        return torch.stack(pieces)
    return first.as_strided((len(pieces), *first.shape), (steps.pop(), *first.stride()))


def refuse_operation(name: str, args: Any) -> PerSampleRefused:
    """The error for an operation that has no exact per-sample form here.

    Parameters
    ----------
    name : str
        Of the operation.
    args : Any
        Its arguments, among which mixed parameters are looked for.

    Returns
    -------
    PerSampleRefused
        The error, to be raised.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.per_sample.mixed_tensor import Mixed, refuse_operation
    >>> pieces, weights = [torch.zeros(2), torch.ones(2)], torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> bias = Mixed.linear(pieces, weights, owners=("bias",), used=set())
    >>> str(refuse_operation("torch.fft.fft", (bias,))).partition("; ")[0]
    "per-sample merging: the operation 'torch.fft.fft' on bias has no exact form here"
    """
    parameters = sorted({one for mixed in mixed_in(args) for one in mixed.owners})
    return PerSampleRefused(
        f"per-sample merging: the operation '{name}' on {', '.join(parameters) or 'a parameter'} has no exact form here; "
        "use one merge per distinct row instead (per_sample: rows)"
    )


def aligned(mixed: Mixed, like: Tensor) -> Tensor:
    """Values of a mixed parameter that broadcast against activations of m windows for every sample.

    Parameters
    ----------
    mixed : Mixed
        A mixed parameter.
    like : Tensor
        Activations (N m, ...), sample by sample.

    Returns
    -------
    Tensor
        (N m, ...) or (N m, 1, ...).

    Raises
    ------
    PerSampleRefused
        If it has a first axis for the batch that is not 1, or more axes than the activations.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.per_sample.mixed_tensor import Mixed, aligned
    >>> pieces, weights = [torch.zeros(2), torch.ones(2)], torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> bias = Mixed.linear(pieces, weights, owners=("bias",), used=set())
    >>> aligned(bias, torch.zeros(4, 2))  # two windows of each sample
    tensor([[0.1000, 0.1000],
            [0.1000, 0.1000],
            [0.8000, 0.8000],
            [0.8000, 0.8000]])
    """
    values, dims, groups = per_sample(mixed), mixed.ndim, like.shape[0] // count(mixed)
    if dims == like.ndim and dims > 0:
        if mixed.shape[0] != 1:
            raise refuse_operation("broadcast", [mixed])
        values = values[:, 0]
    elif dims < like.ndim:
        values = values.reshape(len(values), *[1] * (like.ndim - 1 - dims), *mixed.shape)
    else:
        raise refuse_operation("broadcast", [mixed])
    return values.repeat_interleave(groups, 0) if groups > 1 else values


def for_every_sample(func: Any, name: str, args: Any, kwargs: Any, constants: bool = False) -> Any:
    """An operation on every sample's own merged parameter; exact whatever it is, as long as no activation takes part.

    Parameters
    ----------
    func : Any
        The operation of torch.
    name : str
        Of it, for the error message.
    args : Any
        Its positional arguments.
    kwargs : Any
        Its arguments by name.
    constants : bool, default False
        Whether other tensors may take part, as tables that are the same for every sample.

    Returns
    -------
    Any
        A mixed parameter.

    Raises
    ------
    PerSampleRefused
        If another tensor takes part that may be an activation.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.per_sample.mixed_tensor import Mixed, for_every_sample, per_sample
    >>> pieces, weights = [torch.zeros(2), torch.ones(2)], torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> bias = Mixed.linear(pieces, weights, owners=("bias",), used=set())
    >>> per_sample(for_every_sample(torch.exp, "exp", (bias,), {}))
    tensor([[1.1052, 1.1052],
            [2.2255, 2.2255]])
    """
    if not constants and any(not isinstance(item, Mixed) for item in _tensors_in((args, kwargs))):
        raise refuse_operation(name, (args, kwargs))
    mixed = list(mixed_in((args, kwargs)))
    names, used = tuple(dict.fromkeys(one for item in mixed for one in item.owners)), mixed[0].used
    merged = {id(item): per_sample(item) for item in mixed}
    results = [func(*_swap(args, merged, i), **_swap(kwargs, merged, i)) for i in range(count(mixed[0]))]
    if isinstance(results[0], tuple | list):
        return tuple(Mixed.computed(torch.stack(list(parts)), names, used) for parts in zip(*results, strict=True))
    return Mixed.computed(torch.stack(results), names, used)


def _swap(tree: Any, merged: dict[int, Tensor], i: int) -> Any:
    if isinstance(tree, Mixed):
        return merged[id(tree)][i]
    if isinstance(tree, dict):
        return {key: _swap(item, merged, i) for key, item in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_swap(item, merged, i) for item in tree)
    return tree


def _tensors_in(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ()
    return [found for item in items for found in _tensors_in(item)]


def mixed_in(tree: Any) -> list[Mixed]:
    """Mixed parameters among arguments, however deep.

    Parameters
    ----------
    tree : Any
        Lists, tuples and dicts of anything.

    Returns
    -------
    list[Mixed]
        Them, in order.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.per_sample.mixed_tensor import Mixed, mixed_in
    >>> pieces, weights = [torch.zeros(2), torch.ones(2)], torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> bias = Mixed.linear(pieces, weights, owners=("bias",), used=set())
    >>> len(mixed_in([bias, {"deeper": (1, bias)}]))
    2
    """
    return [item for item in _tensors_in(tree) if isinstance(item, Mixed)]


def _attribute(func: Any, mixed: Mixed) -> Any:
    if func == torch.Tensor.device.__get__:  # a new object at each look-up, so `is` never holds
        return (mixed.merged if mixed.merged is not None else mixed.pieces[0]).device
    with torch._C.DisableTorchFunctionSubclass():
        return func(mixed)


def _empty(shape: Any, dtype: torch.dtype) -> Mixed:
    """A tensor of that shape without content: what slips past the table fails instead of computing with some expert's weights."""
    return torch.Tensor._make_subclass(Mixed, torch.empty(shape, dtype=dtype, device="meta"))
