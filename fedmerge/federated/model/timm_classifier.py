"""A classifier of timm by its name. timm is imported where a model is built: its import takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BeforeValidator, ConfigDict, Field, model_validator, with_config
from torch import nn
from typing_extensions import TypedDict

from fedmerge.data.datasets._base import Geometry
from fedmerge.errors import Problem, ScenarioError, first_line, nearest
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


MOST_BLOCKS = 200
"""Of a model; the deepest vision transformers have about 50."""


def _blocks(value: Any) -> Any:
    """A model without blocks, timm builds without a word, and one of thousands for minutes."""
    if isinstance(value, int) and value < 1:
        raise ValueError("expected at least 1")
    if isinstance(value, int) and value > MOST_BLOCKS:
        raise ValueError(f"expected at most {MOST_BLOCKS}")
    return value


@with_config(ConfigDict(extra="allow"))
class Arguments(TypedDict, total=False):
    """What a model's constructor is given; what is not named here, timm knows."""

    img_size: Annotated[int, BeforeValidator(_side), Field(ge=8, le=1024, description="side of the input image, pixels")]
    in_chans: Annotated[Literal[1, 3], Field(description="1 for gray images, 3 for color")]
    depth: Annotated[Any, BeforeValidator(_blocks), Field(description="number of blocks; a list for models with stages")]


GIVEN = {
    "num_classes": "the sites' classes say it",
    "drop_rate": "training.diversity.dropout says it",
    "pretrained": "initialization: {kind: pretrained} says it",
    "checkpoint_path": "initialization: {kind: checkpoint, path: FILE.safetensors} says it",
    "features_only": "a classifier is trained",
    "scriptable": "modules are merged as Python runs them",
}
"""Arguments of timm's constructor that are not for `model.kwargs`, and why."""


FOR_TEXT = ("templates", "words", "weights", "tune", "head")
"""Keys of a model that reads text."""


class ModelSpec(Spec):
    """A timm classifier and what its constructor is given."""

    name: str = Field(description="timm's name of the model, e.g. vit_base_patch32_224")
    kwargs: Arguments = Field(default_factory=lambda: Arguments(), description="arguments of the model's constructor")
    size: int | None = Field(None, ge=8, le=1024, description="side of the input image; default kwargs.img_size, else 224")

    @model_validator(mode="before")
    @classmethod
    def _of_timm(cls, value: Any) -> Any:
        """`kind: timm` may be said. Prompts are for models that read text."""
        if cls is not ModelSpec or not isinstance(value, dict):
            return value
        if found := [key for key in FOR_TEXT if key in value]:
            raise ValueError(f"{', '.join(found)}: only a model that reads text has them. Say 'kind: clip', or leave them out")
        return {key: item for key, item in value.items() if key != "kind"}

    def probing(self, steps: int) -> tuple[int, float]:
        """How many of a run's steps train the head alone, before the others train all; and their learning rate."""
        return 0, 0.0

    @property
    def reads_text(self) -> bool:
        """Whether prompts make its head, so that classes can differ between hospitals and target."""
        return False

    @property
    def as_sent(self) -> ModelSpec:
        """What others than the server need of it."""
        return self

    @property
    def geometry(self) -> Geometry:
        """Side and channels of the input."""
        return Geometry(self.size or self.kwargs.get("img_size", 224), self.kwargs.get("in_chans", 3))


def build_timm(
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
            raise ScenarioError([_misfit(spec, first_line(error))]) from None
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
    for key, value in spec.kwargs.items():
        if isinstance(value, str) and (number := _as_number(value)):
            mend = f"Write {number}: YAML takes {value} for text"
            return Problem("scenario", f"model.kwargs.{key}", f"the text '{value}' ({said})", "a number", mend)
    return Problem("scenario", "model.kwargs", f"{spec.kwargs} ({said})", f"arguments that {spec.name} accepts")


def _as_number(text: str) -> str:
    """A number as YAML takes it for one, of a text such as `1e-5` or `012`; empty for another text."""
    try:
        number = int(text) if text.isdecimal() else float(text)
    except ValueError:
        return ""
    return str(yaml.safe_dump(number)).split()[0]


def timm_normalization(spec: ModelSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
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
