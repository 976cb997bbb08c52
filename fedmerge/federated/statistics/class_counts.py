"""How many training images of each class a hospital has: what its expert's head has learned of how common they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmerge.federated.statistics._base import Ground, Shapes, State, Statistic, negativity
from fedmerge.merging.bank.layout import head_names


class ClassCounts(Statistic):
    """n_c (C,), in the order of the classes. It tells how often a hospital sees each disease: see docs/privacy.md."""

    def layout(self, model: nn.Module) -> Shapes:
        """One number for each output of the classifier."""
        outputs = getattr(model, "num_classes", None)  # of timm's models, and of CLIPs, whose head is made of prompts
        return {"counts": (outputs or len(model.get_parameter(head_names(model)[-1])),)}

    def measure(self, ground: Ground) -> State:
        """Counts of the training images' labels."""
        (size,) = self.layout(ground.model)["counts"]
        return {"counts": torch.bincount(ground.y.cpu(), minlength=size).float()}

    def refuses(self, name: str, tensor: Tensor) -> str:
        """Whole numbers that are not negative, and not all 0."""
        if not bool((tensor == tensor.round()).all()):
            return "found a number that is not whole; expected counts of images"
        return negativity(tensor) or ("" if bool(tensor.any()) else "found no image at all; expected counts of images")
