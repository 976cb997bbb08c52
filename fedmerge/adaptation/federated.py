"""Global models that strategies have made in rounds, as rows of the table: one forward for each batch, and nothing is merged."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from fedmerge.adaptation.task import Federated, RowInfo, TargetTask
from fedmerge.experts.backbone import build
from fedmerge.merge.method import Method


class Fixed(Method):
    """A model that no expert's coming or going changes."""

    paper: ClassVar[str] = ""

    @classmethod
    def kind(cls) -> str:
        """As the table has it."""
        return "federated"


def info(model: Federated) -> RowInfo:
    """What the report says of it."""
    return RowInfo(model.paper, "federated", (), False, True, model.hyper_parameters, model.remark)


def model_of(federated: Federated, task: TargetTask, device: str) -> nn.Module:
    """The model in evaluation mode."""
    model = build(task.model, len(task.classes), seed=task.seed)
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in federated.weights.items()})
    return model.to(device).eval()
