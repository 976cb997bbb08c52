"""The classifier that all hospitals share: timm's, or an image tower of CLIP under a head made of class prompts."""

from fedmerge.federated.model.building import (
    AnyModel,
    answering,
    build,
    model_of_json,
    normalization,
    ties_of,
    train_mode,
    try_out,
)
from fedmerge.federated.model.clip_classifier import ClipSpec
from fedmerge.federated.model.timm_classifier import Arguments, ModelSpec, on_the_hub, renew_head

__all__ = [
    "AnyModel",
    "Arguments",
    "ClipSpec",
    "ModelSpec",
    "answering",
    "build",
    "model_of_json",
    "normalization",
    "on_the_hub",
    "renew_head",
    "ties_of",
    "train_mode",
    "try_out",
]
