"""Tiny CLIPs with random weights, as files of every layout, and what scenarios say of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedmerge.data.datasets.organ_phantom import ORGANS

if TYPE_CHECKING:
    import open_clip  # takes as long as torch itself: only processes that run these tests know it

WORDS = {organ: " ".join(reversed(organ.split("-"))) for organ in ORGANS}
TEXT = {"context_length": 16, "width": 16, "heads": 2, "layers": 1}
VIT: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 24, "layers": 2, "head_width": 12},
    "text_cfg": TEXT,
}
RESNET = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 8}, "text_cfg": TEXT}
MODEL = {"kind": "clip", "name": "ViT-B-32", "kwargs": VIT, "templates": ["a scan of the {}", "a {}."], "words": WORDS}


def random_clip(config: dict[str, Any] = VIT, seed: int = 0) -> open_clip.CLIP:
    """The library's own model, for what is ours to be compared with."""
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config)
        with torch.no_grad():  # its own start says nothing about a text
            model.text_projection.normal_()
            model.token_embedding.weight.normal_()
    return model.eval()


def saved(file: Path, state: dict[str, Tensor]) -> str:
    """The file's path, with its state in it."""
    torch.save(state, file)
    return str(file)
