"""A model by its specification, whichever library builds it, and what is the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any

import torch
from pydantic import Discriminator, Tag, TypeAdapter
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge.errors import Problem, ScenarioError, first_line
from fedmerge.federated.model.clip_classifier import ClipSpec, build_clip, clip_normalization
from fedmerge.federated.model.timm_classifier import ModelSpec, build_timm, timm_normalization
from fedmerge.merging.bank.layout import tied


def _library(value: Any) -> Any:
    if isinstance(value, ModelSpec):
        return "clip" if isinstance(value, ClipSpec) else "timm"
    return value.get("kind", "timm") if isinstance(value, dict) else "timm"


AnyModel: Any = Annotated[Annotated[ModelSpec, Tag("timm")] | Annotated[ClipSpec, Tag("clip")], Discriminator(_library)]
"""What `model` may say: a classifier of timm, unless `kind: clip`."""


def build(
    spec: ModelSpec, classes: int, dropout: float = 0.0, pretrained: Mapping[str, Any] | None = None, seed: int = 0
) -> nn.Module:
    """The model in float32 with a fresh head of `classes` outputs; `dropout` acts before the head.

    pretrained: with timm's pretrained weights, and what timm is told of where they lie. Otherwise weights depend on the seed alone;
    the global generators are left as they were.
    Raises ScenarioError for a name or an argument that its library does not know.
    """
    if isinstance(spec, ClipSpec):
        return build_clip(spec, classes, dropout, seed)
    return build_timm(spec, classes, dropout, pretrained, seed)


NEVER = -1e4
"""A logit whose softmax is 0, and which is a number all the same."""


def answering(model: nn.Module, among: Sequence[bool]) -> nn.Module:
    """The model, whose logits of the other classes are so low that softmax, losses and predictions do not see them.

    So a hospital trains the softmax of its own classes, and all experts have one layout. among: for each class, whether it counts.
    """
    others = ~torch.tensor(among)

    def among_its_own(_: nn.Module, __: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(others.to(logits.device), NEVER)

    model.register_forward_hook(among_its_own)
    return model


@cache
def _tried(model_json: str, classes: int) -> tuple[str, str, int]:
    """What one forward of one black image gave: why it failed, the shape of its output otherwise, and rows of pixels left over."""
    spec = model_of_json(model_json)
    side, channels = spec.geometry
    model = build(spec, classes).eval()
    try:
        with torch.no_grad():
            output = model(torch.zeros(1, channels, side, side))
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return first_line(error), "", 0
    if not isinstance(output, torch.Tensor):
        return "", type(output).__name__, 0
    return "", str(tuple(output.shape)), _rim(model, channels, side)


def model_of_json(model_json: str) -> ModelSpec:
    """A specification that was written as JSON."""
    spec: ModelSpec = TypeAdapter(AnyModel).validate_json(model_json)
    return spec


def try_out(spec: ModelSpec, classes: int) -> list[str]:
    """See that the model takes its images, by one forward of a black one; what a reader should know of it.

    Raises ScenarioError that names the key, before anything is computed by a model that does not.
    """
    side = spec.geometry.size
    failure, shape, rim = _tried(spec.model_dump_json(), classes)
    if failure:
        key = "model.size" if spec.size else "model.kwargs.img_size"
        mend = f"A model that is built for one size is told it by kwargs: {{img_size: {side}}}" if "match" in failure else ""
        raise ScenarioError([Problem("scenario", key, f"{side} ({failure.rstrip('.')})", f"a size that {spec.name} takes", mend)])
    if shape != f"(1, {classes})":
        expected = f"(1, {classes}), one row of logits for an image"
        raise ScenarioError([Problem("scenario", "model.kwargs", f"a model whose output is {shape}", expected)])
    return (
        [f"model: the last {rim} of {side} rows or columns are not seen: its patches or strides do not divide {side}"]
        if rim
        else []
    )


def ties_of(spec: ModelSpec) -> dict[str, str]:
    """Names of the parameters that the model ties to others, and theirs."""
    return _ties_of(spec.model_dump_json())


@cache
def _ties_of(model_json: str) -> dict[str, str]:
    return tied(build(model_of_json(model_json), 2).state_dict())


def _rim(model: nn.Module, channels: int, side: int) -> int:
    """Rows or columns at the end that change no feature, as where patches do not divide the side. It spoils the model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a layer that begins at 0 would hide what it sees
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    image = torch.rand(1, channels, side, side, generator=generator).requires_grad_()
    features = getattr(model, "forward_features", model)(image)
    if not isinstance(features, torch.Tensor):
        return 0
    into = torch.randn(features.shape, generator=generator)
    (slope,) = torch.autograd.grad((features * into).sum(), image)
    seen = [torch.nonzero(slope.abs().amax(axes)) for axes in ((0, 1, 3), (0, 1, 2))]
    return max(side - 1 - int(lines.max()) for lines in seen) if len(seen[0]) else 0


def normalization(spec: ModelSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel: 0.5 for gray images, else what the model's pretrained weights expect."""
    return clip_normalization(spec) if isinstance(spec, ClipSpec) else timm_normalization(spec)


def train_mode(model: nn.Module) -> nn.Module:
    """Training mode with BatchNorm frozen in evaluation mode, as DiWA does: its statistics stay those of theta_0."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model
