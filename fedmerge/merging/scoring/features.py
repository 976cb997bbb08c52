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
    """What `run` gives, logits (N, C) by the model, and the inputs of the head meanwhile, (N, D) float64.

    head: names of its parameters, where they are known. Raises CheckpointError if no module is the head.
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
    """The module whose parameters are the head. Raises CheckpointError if there is none."""
    names = head or head_names(model)
    owner = names[0].rpartition(".")[0]
    if not owner:
        raise CheckpointError(f"found a head, {names[0]}, that is no module; expected one, with features as input")
    return model.get_submodule(owner)


def width_of(model: nn.Module) -> int:
    """D. Raises CheckpointError if the head does not say it."""
    head = head_module(model)
    weight = getattr(head, "weight", None)
    weight = getattr(getattr(head, "text", None), "text_projection", None) if weight is None else weight  # of a head from prompts
    weight = weight.weight.T if isinstance(weight, nn.Linear) else weight
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise CheckpointError(f"found a head, {type(head).__name__}, that does not say how many features it is given")
    return int(weight.shape[1])


def center(features: Tensor) -> Tensor:
    """phi (D,) = normalize((1/N) sum_i normalize(f_i)) of features (N, D): a centroid as TTMM has it."""
    return F.normalize(F.normalize(features, dim=1).mean(0), dim=0)


@torch.no_grad()
def center_of(model: nn.Module, batches: tuple[Tensor, ...]) -> Tensor:
    """The centroid (D,) of images in batches, under a model in evaluation mode."""
    found = [with_embedding(model, partial(model, batch))[1] for batch in batches]
    return center(torch.cat(found))
