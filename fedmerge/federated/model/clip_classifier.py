"""CLIP as a classifier: an image tower of open_clip under a head of class prompts. open_clip is imported where it is used."""

from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from fedmerge.data.datasets._base import Geometry
from fedmerge.errors import CheckpointError, Problem, ScenarioError, extras_named, first_line, nearest
from fedmerge.federated.model.timm_classifier import ModelSpec
from fedmerge.rng import seed_of
from fedmerge.system.offline import silence

ELSEWHERE = ("hf-hub:", "local-dir:")
"""What an architecture's name begins with that is described on the Hugging Face hub, or in a folder here, as open_clip has it."""

PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of OpenAI's images, which most weights of open_clip expect."""


def _with_place(template: str) -> str:
    if template.count("{}") != 1:
        count = template.count("{}")
        raise ValueError(f"expected one {{}} for the word of a class, e.g. 'a photo of a {{}}.'; found {count} in '{template}'")
    return template


class ClipSpec(ModelSpec):
    """A CLIP of open_clip, and the prompts that make its head: one class, one word in every template."""

    kind: Literal["clip"] = "clip"
    name: str = Field(description="open_clip's name, e.g. ViT-B-16 or RN50; or local-dir:FOLDER or hf-hub:NAME")
    kwargs: dict[str, Any] = Field(  # type: ignore[assignment]
        default_factory=dict, description="changes to the model's configuration: embed_dim, vision_cfg, text_cfg, quick_gelu"
    )
    size: int | None = Field(None, ge=8, le=1024, description="side of the input image; default that of the configuration")
    weights: str | None = Field(
        None,
        description="a file in the layout of open_clip, OpenAI or BioMedCLIP, which may name environment variables "
        "as ${NAME}; or, with a network, a tag of open_clip, such as laion2b_s34b_b79k; none for a proxy",
    )
    templates: tuple[Annotated[str, AfterValidator(_with_place)], ...] = Field(
        ("a photo of a {}.",),
        min_length=1,
        max_length=200,
        description="prompts with {} for the class; their embeddings are averaged",
    )
    words: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        default_factory=dict, description="words for each class in the prompts, e.g. femur-left: left femoral head"
    )
    tune: Literal["image", "both"] = Field(
        "image",
        description="what hospitals train: the image tower, or both towers by the cross-entropy of prompts (FLYPCE of FLYP)",
    )
    head: Literal["text", "ft", "lp_ft"] = Field(
        "text",
        description="head of the CLIP. text: fixed by the prompts; ft: trained, starting from the prompts (WiSE-FT);"
        " lp_ft: trained alone for a third of the steps, then with the tower (Kumar et al., LP-FT, ICLR "
        "2022)",
    )

    @model_validator(mode="after")
    def _one_head(self) -> ClipSpec:
        if self.tune == "both" and self.head != "text":
            raise ValueError(f"head: {self.head} with tune: both: a trained head has no text tower. Choose one of the two")
        seen: dict[str, str] = {}
        for name, word in self.words.items():
            if (other := seen.setdefault(" ".join(word.lower().split()), name)) != name:
                raise ValueError(f"words: '{other}' and '{name}' have one prompt, '{word}': expected one of its own for each")
        return self

    @property
    def geometry(self) -> Geometry:
        """Side and channels of the input. Raises ScenarioError for a name that open_clip does not know."""
        side = self.size or configuration(self)["vision_cfg"].get("image_size", 224)
        return Geometry(side[0] if isinstance(side, list | tuple) else side, 3)

    lp_lr: float = Field(1e-3, gt=0, description="learning rate of the head alone, with head: lp_ft")

    def probing(self, steps: int) -> tuple[int, float]:
        """A third of them, where the head is probed first."""
        return (steps // 3, self.lp_lr) if self.head == "lp_ft" else (0, 0.0)

    @property
    def reads_text(self) -> bool:
        """Yes."""
        return True

    @property
    def as_sent(self) -> ClipSpec:
        """Without the words, which the head has in it, and the server's file; a tag says which pixels are expected."""
        tag = self.weights if self.weights and Path(self.weights).name == self.weights and not Path(self.weights).suffix else None
        return self.model_copy(update={"weights": tag, "words": {}})

    @property
    def fixed_head(self) -> bool:
        """Whether prompts alone say what the head is, so that it can be another for other classes."""
        return self.head == "text"


class TextHead(nn.Module):
    """exp(s) W f/|f|, W the classes' text embeddings, s the logit scale: a parameter, which is merged before its exponential."""

    def __init__(self, classes: int, width: int, trained: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(classes, width), dim=-1), requires_grad=trained)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)), requires_grad=trained)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, C) of image embeddings (N, width)."""
        return F.linear(F.normalize(features, dim=-1), self.weight) * self.logit_scale.exp()


class PromptHead(nn.Module):
    """The same with W computed from the text tower at every forward, as its weights are then.

    tokens: prompts (C, templates, length).

    They are a buffer, so that who has the state has the prompts, and nobody needs a tokenizer but the server.
    """

    tokens: Tensor

    def __init__(self, text: nn.Module, classes: int, templates: int, length: int) -> None:
        super().__init__()
        self.text = text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("tokens", torch.zeros(classes, templates, length, dtype=torch.long))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, C) of image embeddings (N, width)."""
        return F.linear(F.normalize(features, dim=-1), embedded(self.text, self.tokens)) * self.logit_scale.exp()


class ClipClassifier(nn.Module):
    """An image tower and a head of `num_classes` outputs."""

    def __init__(self, visual: nn.Module, head: nn.Module, dropout: float) -> None:
        super().__init__()
        self.visual, self.head, self.dropout = visual, head, nn.Dropout(dropout)

    @property
    def num_classes(self) -> int:
        """Outputs, as timm's models name theirs."""
        return len(self.head.tokens if isinstance(self.head, PromptHead) else self.head.weight)  # type: ignore[arg-type]

    def get_classifier(self) -> nn.Module:
        """The head, as timm's models name theirs."""
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Image embeddings (N, width)."""
        features: Tensor = self.visual(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C)."""
        logits: Tensor = self.head(self.dropout(self.forward_features(x)))
        return logits


class AttentionPool(nn.Module):
    """The pool of CLIP's ResNets under open_clip's names, with the samples as the first axis as everywhere else.

    So samples can have models of their own (`merging/per_sample`): there every activation begins with the samples.
    """

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.positional_embedding = pool.positional_embedding
        self.k_proj, self.q_proj, self.v_proj, self.c_proj = pool.k_proj, pool.q_proj, pool.v_proj, pool.c_proj
        self.num_heads = int(pool.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, width): what the mean of the places asks of all places."""
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (item.reshape(*item.shape[:2], self.num_heads, -1).transpose(1, 2) for item in (q, k, v))
        found: Tensor = self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))
        return found


def embedded(text: nn.Module, tokens: Tensor) -> Tensor:
    """Text embeddings (C, width) of length 1: the mean over the templates' embeddings, each of length 1 before (Radford et al.)."""
    each = F.normalize(text(tokens.flatten(0, 1)), dim=-1)
    return F.normalize(each.reshape(*tokens.shape[:2], -1).mean(1), dim=-1)


def configuration(spec: ClipSpec) -> dict[str, Any]:
    """The architecture as open_clip describes it, with what the scenario says otherwise. Raises ScenarioError."""
    try:
        found = copy.deepcopy(_named(spec.name))
    except (OSError, ValueError, RuntimeError) as error:
        expected = "a folder with open_clip_config.json, or a model of the hub and a network"
        raise ScenarioError([Problem("scenario", "model.name", f"'{spec.name}' ({first_line(error)})", expected)]) from None
    if found is None:
        known = _models()
        mend = nearest(spec.name, known)
        mend = mend if mend.endswith("?") else "Their names: python -c 'import open_clip; print(open_clip.list_models())'"
        raise ScenarioError([Problem("scenario", "model.name", f"'{spec.name}'", "a model of open_clip", mend)])
    for key, value in spec.kwargs.items():
        found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
    if spec.size:
        found["vision_cfg"]["image_size"] = spec.size
    found["vision_cfg"] |= {"timm_model_pretrained": False, "output_tokens": False}
    found["text_cfg"] |= {"hf_model_pretrained": False, "output_tokens": False}
    return found


def build_clip(spec: ClipSpec, classes: int, dropout: float = 0.0, seed: int = 0) -> ClipClassifier:
    """Image tower and head with random weights, which depend on the seed alone. Raises ScenarioError."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "model"))
        visual = tower(spec, "vision")
        if spec.tune == "image":
            head: nn.Module = TextHead(classes, configuration(spec)["embed_dim"], trained=spec.head != "text")
        else:
            text = tower(spec, "text")
            head = PromptHead(text, classes, len(spec.templates), context_length(spec))
    return ClipClassifier(visual, head, dropout).float()


def tower(spec: ClipSpec, which: Literal["vision", "text"]) -> nn.Module:
    """One of the two towers with random weights. Raises ScenarioError for a configuration that cannot be built."""
    silence()
    config = configuration(spec)
    with extras_named():
        from open_clip import model as open_clip_model
    make = open_clip_model._build_vision_tower if which == "vision" else open_clip_model._build_text_tower
    try:
        built: nn.Module = make(config["embed_dim"], config[f"{which}_cfg"], config.get("quick_gelu", False))
    except ImportError:
        raise CheckpointError(
            f"model.name: found '{spec.name}', which needs transformers; expected this package: pip install transformers"
        ) from None
    except (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        found = f"{spec.kwargs} ({first_line(error)})" if spec.kwargs else f"'{spec.name}' ({first_line(error)})"
        key = "model.kwargs" if spec.kwargs else "model.name"
        expected = f"a configuration of open_clip that can be built ({which} tower)"
        raise ScenarioError([Problem("scenario", key, found, expected)]) from None
    if which == "vision" and type(getattr(built, "attnpool", None)).__name__ == "AttentionPool2d":
        built.attnpool = AttentionPool(built.attnpool)
    return built


def context_length(spec: ClipSpec) -> int:
    """Tokens of a prompt, with its begin and end."""
    return int(configuration(spec)["text_cfg"].get("context_length", 77))


def clip_normalization(spec: ClipSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel that the weights of this name expect."""
    if spec.name.startswith(ELSEWHERE):
        return PIXELS
    with extras_named():
        import open_clip
    tags = open_clip.list_pretrained_tags_by_model(spec.name)
    asked = spec.weights if spec.weights in tags else next(iter(tags), "")
    known = open_clip.get_pretrained_cfg(spec.name, asked) if asked else {}
    return tuple(known.get("mean") or PIXELS[0]), tuple(known.get("std") or PIXELS[1])


@cache
def _named(name: str) -> dict[str, Any] | None:
    silence()
    with extras_named():
        import open_clip
    found: dict[str, Any] | None = open_clip.get_model_config(name)
    return found


def _models() -> list[str]:
    import open_clip

    return list(open_clip.list_models())
