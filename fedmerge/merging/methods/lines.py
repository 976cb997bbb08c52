"""A merged task vector scaled by depth: layers near the images stay near the initialization, those near the output move."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.methods._base import Building, Static


class Lines(Building, Static):
    """theta^l = theta_0^l + (a + b (l - 1)/(L - 1)) tau^l for layers l = 1 .. L; tau: the mean task vector, or another rule's.

    A layer is a block, an element of the model's lists and sequences of modules of one kind; in a model that has none, every module
    with parameters of its own. What comes before the first block is scaled as that block, what comes after a block as it; the head
    is the last layer with the last block. Where L = 1 the scale is a + b.
    Where sources differ: the authors' code scales all outside of blocks by a, the last norm too, and has no head. They set
    a = ||sum_k tau_k||_1 / (K ||tau||_1) and choose b on labeled validation images; here both are given.
    Worked example: three blocks, a = 0.3, b = 0.7: 0.3, 0.65 and 1 times the mean task vector, and the mean of the heads.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Sequential(*(torch.nn.Linear(1, 1, bias=False) for _ in range(4)))
    >>> start = {name: torch.zeros(1, 1) for name in model.state_dict()}
    >>> a, b = ({name: torch.full((1, 1), value) for name in start} for value in (1.0, 3.0))
    >>> merged = fedmerge.merge(model, [a, b], "lines", base=start, a=0.3, b=0.7)
    >>> {name: round(value.item(), 2) for name, value in merged.items()}
    {'0.weight': 0.6, '1.weight': 1.07, '2.weight': 1.53, '3.weight': 2.0}
    """

    paper: ClassVar[str] = "Wang et al., LiNeS: post-training layer scaling, ICLR 2025"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    a: float = Field(0.3, ge=0, le=2, description="scale of the first layer's task vector")
    b: float = Field(0.7, ge=-2, le=2, description="how much larger the last layer's scale is")

    def statistics(self, bank: Bank) -> Tensor | None:
        """As the method whose task vector is scaled."""
        return self.built_on.statistics(bank)

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        theta_0 = bank.anchor_row("theta_0").to(bank.wide)
        tau = self.built_on.merge(bank).to(bank.wide) - theta_0
        widths = torch.tensor([shape.numel() for shape in bank.shapes.values()], device=tau.device)
        scale = self.a + self.b * torch.tensor(depths(bank), dtype=tau.dtype, device=tau.device)
        return theta_0 + scale.repeat_interleave(widths) * tau


def depths(bank: Bank) -> list[float]:
    """Depth (l - 1)/(L - 1) of every parameter: 0 in the first layer, 1 in the last and in the head.

    Parameters
    ----------
    bank : Bank
        The experts.

    Returns
    -------
    list[float]
        P numbers in [0, 1], in the order of columns.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.methods.lines import depths
    >>> model = torch.nn.Sequential(*(torch.nn.Linear(1, 1, bias=False) for _ in range(4)))
    >>> depths(Bank.of(model, [model.state_dict()]))
    [0.0, 0.3333333333333333, 0.6666666666666666, 1.0]
    """
    blocks = _blocks(bank.model)
    layers: list[str] = []
    l = []  # noqa: E741 - the paper's symbol, from 0
    for name in bank.shapes:
        inside = [block for block in blocks if name.startswith(f"{block}.")]
        layer = max(inside, key=len, default="") if blocks else name.rpartition(".")[0]
        if layer not in layers and (inside or not blocks):
            layers.append(layer)
        l.append(layers.index(layer) if layer in layers else max(0, len(layers) - 1))
    last = len(layers) - 1
    return [1.0 if name in bank.parts.head or last == 0 else step / last for name, step in zip(bank.shapes, l, strict=True)]


def _blocks(model: nn.Module) -> list[str]:
    """Names of the modules that lie in a list or sequence of modules of one kind, and have parameters."""
    return [
        f"{name}.{number}" if name else number
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(item) for item in module}) == 1
        for number, item in module.named_children()
        if any(True for _ in item.parameters())
    ]
