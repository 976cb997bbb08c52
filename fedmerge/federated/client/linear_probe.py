"""Federated linear probing: the encoder is frozen, and only heads travel. The problem is convex, so averaging is safe."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmerge.data.images import Normalized, at_a_time
from fedmerge.federated.client.site_training import admit_images
from fedmerge.federated.messages import SiteTask
from fedmerge.federated.model import build
from fedmerge.federated.security.audit import Declaration, Upload
from fedmerge.federated.statistics._base import State
from fedmerge.merging.bank.layout import head_names

ROUNDS = 5
LOCAL_STEPS = 50
LR = 1e-2


class LinearProbe:
    """A site's part in one round: head-only training from the shared head, full batch, Adam."""

    @staticmethod
    def at_site(task: SiteTask, weights: State) -> Upload:
        """The site's head after LOCAL_STEPS steps on its training images, and how many images those were."""
        torch.set_num_threads(task.training.threads)
        ward = admit_images(task)
        model = build(task.model, len(task.classes), seed=task.seed)
        model.load_state_dict(weights)
        head = _classifier(model)
        features = _features(model, head, ward.train.x)
        optimizer = torch.optim.Adam(head.parameters(), lr=LR)
        for _ in range(LOCAL_STEPS):
            optimizer.zero_grad()
            F.cross_entropy(head(features), ward.train.y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        state = model.state_dict()
        sent = {name: state[name].detach().clone() for name in head_names(model)}
        return Upload(task.site.name, sent, {"n": float(len(ward.train.y))}, classes=ward.images.classes)

    @staticmethod
    def declaration(site: str, upload: Upload, weights: Mapping[str, Tensor]) -> Declaration:
        """Head arrays of the shared layout, and n; nothing else."""
        arrays = {name: (tuple(weights[name].shape), weights[name].dtype) for name in upload.weights if name in weights}
        return Declaration(site, arrays, frozenset({"n"}))


def _classifier(model: nn.Module) -> nn.Module:
    owned = set(head_names(model))
    for name, module in model.named_modules():
        if name and {f"{name}.{inner}" for inner, _ in module.named_parameters()} == owned:
            return model.get_submodule(name)
    raise ValueError(f"no module owns the head's parameters {sorted(owned)}")


@torch.no_grad()
def _features(model: nn.Module, head: nn.Module, x: Tensor | Normalized) -> Tensor:
    """The head's input for every image (N, D), in evaluation mode."""
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model.eval()
    for part in x.split(at_a_time(x, 256)):
        model(part)
    hook.remove()
    return torch.cat(seen)
