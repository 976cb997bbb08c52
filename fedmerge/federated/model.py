"""The backbone that all hospitals share, by its timm name. timm is imported where a model is built: its import takes seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, Field, with_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import TypedDict

from fedmerge.data.datasets._base import Geometry
from fedmerge.errors import Problem, ScenarioError, nearest
from fedmerge.merging.bank.layout import tied
from fedmerge.registry import Spec
from fedmerge.rng import seed_of
from fedmerge.system.offline import silence


def _side(value: Any) -> Any:
    """timm itself takes two sides, too; images are squares here."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) != 2 or value[0] != value[1]:
        raise ValueError("expected one number, as images are squares here")
    return value[0]


def _blocks(value: Any) -> Any:
    """A model without blocks, timm builds without a word."""
    if isinstance(value, int) and value < 1:
        raise ValueError("expected at least 1")
    return value


@with_config(ConfigDict(extra="allow"))
class Arguments(TypedDict, total=False):
    """What a model's constructor is given; what is not named here, timm knows."""

    img_size: Annotated[int, BeforeValidator(_side), Field(ge=8, le=1024)]
    in_chans: Literal[1, 3]
    depth: Annotated[Any, BeforeValidator(_blocks)]


GIVEN = {
    "num_classes": "the sites' classes say it",
    "drop_rate": "training.diversity.dropout says it",
    "pretrained": "initialization: {kind: pretrained} says it",
    "checkpoint_path": "initialization: {kind: checkpoint, path: FILE.safetensors} says it",
    "features_only": "a classifier is trained",
    "scriptable": "modules are merged as Python runs them",
}
"""Arguments of timm's constructor that are not for `model.kwargs`, and why."""


class ModelSpec(Spec):
    """A timm classifier and what its constructor is given."""

    name: str = Field(description="timm's name of the model, e.g. vit_base_patch32_224")
    kwargs: Arguments = Field(default_factory=lambda: Arguments(), description="arguments of the model's constructor")
    size: int | None = Field(None, ge=8, le=1024, description="side of the input image; default kwargs.img_size, else 224")

    @property
    def geometry(self) -> Geometry:
        """Side and channels of the input."""
        return Geometry(self.size or self.kwargs.get("img_size", 224), self.kwargs.get("in_chans", 3))


def build(
    spec: ModelSpec, classes: int, dropout: float = 0.0, pretrained: Mapping[str, Any] | None = None, seed: int = 0
) -> nn.Module:
    """The model in float32 with a fresh head of `classes` outputs; `dropout` acts before the head.

    pretrained: with timm's pretrained weights, and what timm is told of where they lie. Otherwise weights depend on the seed alone;
    the global generators are left as they were.
    Raises ScenarioError for a name or an argument that timm does not know.
    """
    silence()
    import timm

    if not timm.is_model(spec.name.split(".")[0]):
        mend = nearest(spec.name, timm.list_models())
        mend = mend if mend.endswith("?") else "Their names: python -c 'import timm; print(timm.list_models())'"
        raise ScenarioError([Problem("scenario", "model.name", f"'{spec.name}'", "a model of timm", mend)])
    if odd := [
        Problem("scenario", f"model.kwargs.{name}", str(spec.kwargs.get(name)), f"no such key: {why}")
        for name, why in GIVEN.items()
        if name in spec.kwargs
    ]:
        raise ScenarioError(odd)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "model"))
        try:
            model: nn.Module = timm.create_model(
                spec.name,
                pretrained=pretrained is not None,
                num_classes=classes,
                drop_rate=dropout,
                **(pretrained or {}),
                **spec.kwargs,
            )
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if pretrained is not None:  # of weights that cannot be had, the caller knows more
                raise
            raise ScenarioError([_misfit(spec, _first_line(error))]) from None
    return model.float()


def _misfit(spec: ModelSpec, said: str) -> Problem:
    """What is wrong with a model that timm does not build. said: by timm."""
    if "pretrained tag" in said and "." in spec.name:
        import timm

        name, tag = spec.name.split(".", 1)
        known = [one.partition(".")[2] for one in timm.list_pretrained(f"{name}.*")]
        return Problem("scenario", "model.name", f"'{spec.name}'", f"weights that timm has of {name}", nearest(tag, known))
    unknown = said.rpartition("unexpected keyword argument '")[2].partition("'")[0]
    if unknown in spec.kwargs:
        mend = "Say 'size' in place of it, beside 'kwargs'" if unknown == "img_size" else ""
        found = f"{spec.kwargs.get(unknown)} ({said})"
        return Problem("scenario", f"model.kwargs.{unknown}", found, f"arguments that {spec.name} accepts", mend)
    return Problem("scenario", "model.kwargs", f"{spec.kwargs} ({said})", f"arguments that {spec.name} accepts")


@cache
def _tried(name: str, arguments: str, side: int, channels: int, classes: int) -> tuple[str, str, int]:
    """What one forward of one black image gave: why it failed, the shape of its output otherwise, and rows of pixels left over."""
    model = build(ModelSpec(name=name, kwargs=json.loads(arguments), size=side), classes).eval()
    try:
        with torch.no_grad():
            output = model(torch.zeros(1, channels, side, side))
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return _first_line(error), "", 0
    if not isinstance(output, torch.Tensor):
        return "", type(output).__name__, 0
    return "", str(tuple(output.shape)), _rim(model, channels, side)


def try_out(spec: ModelSpec, classes: int) -> list[str]:
    """See that the model takes its images, by one forward of a black one; what a reader should know of it.

    Raises ScenarioError that names the key, before anything is computed by a model that does not.
    """
    side, channels = spec.geometry
    arguments = json.dumps(spec.kwargs, sort_keys=True)
    failure, shape, rim = _tried(spec.name, arguments, side, channels, classes)
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
def _ties_of(spec: str) -> dict[str, str]:
    return tied(build(ModelSpec.model_validate_json(spec), 2).state_dict())


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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def normalization(spec: ModelSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel: 0.5 for gray images, else what the model's pretrained weights expect."""
    channels = spec.geometry.channels
    if channels != 3:
        return (0.5,) * channels, (0.5,) * channels
    silence()
    import timm

    config = timm.get_pretrained_cfg(spec.name)
    return (tuple(config.mean), tuple(config.std)) if config else ((0.5,) * 3, (0.5,) * 3)


def on_the_hub(spec: ModelSpec) -> tuple[str, str | None] | None:
    """Where timm's pretrained weights of the model are: the hub's name of them (or empty) and of the file. None: nowhere."""
    silence()
    import timm

    config = timm.get_pretrained_cfg(spec.name)
    return (config.hf_hub_id or "", config.hf_hub_filename) if config and config.has_weights else None


def train_mode(model: nn.Module) -> nn.Module:
    """Training mode with BatchNorm frozen in evaluation mode, as DiWA does: its statistics stay those of theta_0."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


def renew_head(weights: dict[str, torch.Tensor], heads: tuple[str, ...], how: str, seed: int) -> dict[str, torch.Tensor]:
    """The same weights with a new head. how: "zero", or "random": truncated normal of deviation 0.02, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    renewed = dict(weights)
    for name in heads:
        fresh = torch.zeros_like(weights[name])
        if how == "random" and fresh.ndim > 1:
            nn.init.trunc_normal_(fresh, std=0.02, generator=generator)
        renewed[name] = fresh
    return renewed
