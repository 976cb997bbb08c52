"""A merged task vector scaled by depth: layers near the images stay near the initialization, those near the output move."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes
from fedmerge.merging.methods._base import Of, Static, static_method


class Lines(Static):
    """theta^l = theta_0^l + (a + b (l - 1)/(L - 1)) tau^l for layers l = 1 .. L; tau: the mean task vector, or another rule's.

    A layer is a block, an element of the model's lists and sequences of modules of one kind; in a model that has none, every module
    with parameters of its own. What comes before the first block is scaled as that block, what comes after a block as it; the head
    is the last layer with the last block. Where L = 1 the scale is a + b.
    Where sources differ: the authors' code scales all outside of blocks by a, the last norm too, and has no head. They set
    a = ||sum_k tau_k||_1 / (K ||tau||_1) and choose b on labeled validation images; here both are given.
    Worked example: three blocks, a = 0.3, b = 0.7: 0.3, 0.65 and 1 times the mean task vector, and the mean of the heads.
    """

    paper: ClassVar[str] = "Wang et al., LiNeS: post-training layer scaling, ICLR 2025"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    a: float = Field(0.3, ge=0, le=2, description="scale of the first layer's task vector")
    b: float = Field(0.7, ge=-2, le=2, description="what the last layer's scale has more")
    of: Of = Field("mean", description="the static method whose task vector is scaled: ties, or {ties: {keep: 0.5}}")

    @field_validator("of")
    @classmethod
    def _static(cls, of: Of) -> Of:
        static_method(of)
        return of

    @property
    def built_on(self) -> Static:
        """The method whose task vector is scaled."""
        return static_method(self.of)

    @property
    def needed(self) -> frozenset[str]:
        """theta_0, and what the method that is scaled needs."""
        return self.needs | self.built_on.needed

    @property
    def whole(self) -> bool:
        """As the method that is scaled."""
        return self.built_on.whole

    def working_bytes(self, sizes: Sizes) -> int:
        """As the method that is scaled."""
        return self.built_on.working_bytes(sizes)

    def statistics(self, bank: Bank) -> Tensor | None:
        """As the method that is scaled."""
        return self.built_on.statistics(bank)

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        theta_0 = bank.anchor_row("theta_0").to(bank.wide)
        tau = self.built_on.merge(bank).to(bank.wide) - theta_0
        widths = torch.tensor([shape.numel() for shape in bank.shapes.values()], device=tau.device)
        scale = self.a + self.b * torch.tensor(depths(bank), dtype=tau.dtype, device=tau.device)
        return theta_0 + scale.repeat_interleave(widths) * tau


def depths(bank: Bank) -> list[float]:
    """(l - 1)/(L - 1) of every parameter, in the order of columns: 0 in the first layer, 1 in the last and in the head."""
    blocks = _blocks(bank.model)
    owners = {name: name.rpartition(".")[0] for name in bank.parts.encoder}
    if blocks:
        inside = {name: [block for block in blocks if name.startswith(f"{block}.")] for name in owners}
        owners = {name: max(found, key=len) if found else "" for name, found in inside.items()}
    layers: list[str] = []
    l = []  # noqa: E741 - the paper's symbol
    for owner in owners.values():
        if owner not in layers and not (blocks and owner == ""):
            layers.append(owner)
        l.append(layers.index(owner) if owner in layers else max(0, len(layers) - 1))
    last = len(layers) - 1 if blocks else len(layers)  # a head without blocks is a layer of its own
    return [step / last if last else 1.0 for step in l] + [1.0] * len(bank.parts.head)


def _blocks(model: nn.Module) -> list[str]:
    """Names of the modules that lie in a list or sequence of modules of one kind, and have parameters."""
    return [
        f"{name}.{number}" if name else number
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(item) for item in module}) == 1
        for number, item in module.named_children()
        if any(True for _ in item.parameters())
    ]
