"""What a model's head is given: the embedding of an image by its encoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmerge.errors import CheckpointError
from fedmerge.merging.bank.layout import head_names


def with_embedding(model: nn.Module, run: Callable[[], Tensor], head: tuple[str, ...] | None = None) -> tuple[Tensor, Tensor]:
    """What a model says of images, and what its head is given meanwhile.

    Parameters
    ----------
    model : nn.Module
        The model that `run` runs.
    run : Callable[[], Tensor]
        Gives the logits (N, C).
    head : tuple[str, ...] | None, optional
        Names of the head's parameters; default: as the model tells.

    Returns
    -------
    tuple[Tensor, Tensor]
        Logits (N, C), and features (N, D) float64.

    Raises
    ------
    CheckpointError
        If no module is the head.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.features import with_embedding
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
    >>> logits, features = with_embedding(model, lambda: model(torch.ones(3, 1, 2, 2)))
    >>> logits.shape, features.shape
    (torch.Size([3, 2]), torch.Size([3, 4]))
    """
    heard: list[Tensor] = []

    def hear(_: nn.Module, inputs: Any) -> None:
        heard.append(inputs[0])

    hook = head_module(model, head).register_forward_pre_hook(hear)
    try:
        logits = run()
    finally:
        hook.remove()
    return logits, heard[-1].flatten(1).double()


def head_module(model: nn.Module, head: tuple[str, ...] | None = None) -> nn.Module:
    """The module whose parameters are the head.

    Parameters
    ----------
    model : nn.Module
        Any model.
    head : tuple[str, ...] | None, optional
        Names of the head's parameters; default: as the model tells.

    Returns
    -------
    nn.Module
        A part of the model.

    Raises
    ------
    CheckpointError
        If there is none.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.features import head_module
    >>> head_module(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))
    Linear(in_features=4, out_features=2, bias=True)
    """
    names = head or head_names(model)
    owner = names[0].rpartition(".")[0]
    if not owner:
        raise CheckpointError(f"found a head, {names[0]}, that is no module; expected one, with features as input")
    return model.get_submodule(owner)


def width_of(model: nn.Module) -> int:
    """How many features a model's head is given.

    Parameters
    ----------
    model : nn.Module
        Any model.

    Returns
    -------
    int
        D.

    Raises
    ------
    CheckpointError
        If the head does not say it.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.features import width_of
    >>> width_of(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))
    4
    """
    head = head_module(model)
    weight = getattr(head, "weight", None)
    weight = getattr(getattr(head, "text", None), "text_projection", None) if weight is None else weight  # of a head from prompts
    weight = weight.weight.T if isinstance(weight, nn.Linear) else weight
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise CheckpointError(f"found a head, {type(head).__name__}, that does not say how many features it is given")
    return int(weight.shape[1])


def center(features: Tensor) -> Tensor:
    """A centroid as TTMM has it: phi = normalize((1/N) sum_i normalize(f_i)).

    Parameters
    ----------
    features : Tensor
        (N, D).

    Returns
    -------
    Tensor
        (D,), of length 1.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.features import center
    >>> center(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))  # lengths of features do not matter
    tensor([0.7071, 0.7071])
    """
    return F.normalize(F.normalize(features, dim=1).mean(0), dim=0)


@torch.no_grad()
def center_of(model: nn.Module, batches: tuple[Tensor, ...]) -> Tensor:
    """The centroid of images under a model in evaluation mode.

    Parameters
    ----------
    model : nn.Module
        The encoder and its head.
    batches : tuple[Tensor, ...]
        Normalized images (N, channels, H, W) each.

    Returns
    -------
    Tensor
        (D,), of length 1.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.features import center_of
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2)).eval()
    >>> center_of(model, (torch.tensor([[3.0, 4.0]]),))
    tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    found = [with_embedding(model, partial(model, batch))[1] for batch in batches]
    return center(torch.cat(found))
