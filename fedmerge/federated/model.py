"""The backbone that all hospitals share, by its timm name. timm is imported where a model is built: its import takes seconds."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge.data.datasets._base import Geometry
from fedmerge.errors import Problem, ScenarioError, nearest
from fedmerge.registry import Spec
from fedmerge.rng import seed_of
from fedmerge.system.offline import silence


class ModelSpec(Spec):
    """A timm classifier and what its constructor is given."""

    name: str = Field(description="timm's name of the model, e.g. vit_base_patch32_224")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="arguments of the model's constructor")
    size: int | None = Field(None, ge=8, le=1024, description="side of the input image; default kwargs.img_size, else 224")

    @property
    def geometry(self) -> Geometry:
        """Side and channels of the input."""
        return Geometry(self.size or int(self.kwargs.get("img_size", 224)), int(self.kwargs.get("in_chans", 3)))


def build(spec: ModelSpec, classes: int, dropout: float = 0.0, pretrained: bool = False, seed: int = 0) -> nn.Module:
    """The model in float32 with a fresh head of `classes` outputs; `dropout` acts before the head.

    Weights depend on the seed alone; the global generators are left as they were.
    Raises ScenarioError for a name or an argument that timm does not know.
    """
    silence()
    import timm

    if not timm.is_model(spec.name.split(".")[0]):
        mend = nearest(spec.name, timm.list_models())[:200]
        raise ScenarioError([Problem("scenario", "model.name", f"'{spec.name}'", "a model of timm", mend)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "model"))
        try:
            model: nn.Module = timm.create_model(
                spec.name, pretrained=pretrained, num_classes=classes, drop_rate=dropout, **spec.kwargs
            )
        except (TypeError, AssertionError, ValueError) as error:
            expected = f"arguments that {spec.name} accepts"
            raise ScenarioError([Problem("scenario", "model.kwargs", f"{spec.kwargs} ({error})", expected)]) from None
    return model.float()


def normalization(spec: ModelSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel: 0.5 for gray images, else what the model's pretrained weights expect."""
    channels = spec.geometry.channels
    if channels != 3:
        return (0.5,) * channels, (0.5,) * channels
    silence()
    import timm

    config = timm.get_pretrained_cfg(spec.name)
    return (tuple(config.mean), tuple(config.std)) if config else ((0.5,) * 3, (0.5,) * 3)


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
