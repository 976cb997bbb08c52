"""Which layers are merged together when a statistic comes in rounds, and what each site is sent for the next round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedmerge.experts.statistic import State
from fedmerge.merge.bank import Bank
from fedmerge.merge.gram import linear_layers, merge_layers

Block = tuple[str, tuple[str, ...]]
"""A prefix of names, e.g. "blocks.3", and the linear weights below it."""


class Rounds:
    """The coordinator's side: K experts (states), a model that they fit, and an image's shape (channels, H, W)."""

    def __init__(self, model: nn.Module, experts: Sequence[State], image: tuple[int, ...], ratio: float, ridge: float) -> None:
        self.bank = Bank.of(model, experts)
        self.experts, self.ratio, self.ridge = experts, ratio, ridge
        self.blocks = blocks(model.eval(), image)
        self.theta = self.bank.theta.mean(0)

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], list[State]]]:
        """For each round its linear weights, and one state for each site: merged up to the block, the site's own from there on."""
        for number, (_, layers) in enumerate(self.blocks):
            own = tuple(prefix for prefix, _ in self.blocks[number:])
            merged = self.bank.state_dict(self.theta)
            yield layers, [{n: expert[n] if _below(n, own) else merged[n] for n in expert} for expert in self.experts]

    def merge(self, G: Sequence[Mapping[str, Tensor]]) -> None:
        """End a round: merge its block with what K sites have sent."""
        stacked = {name: torch.stack([one[name] for one in G]) for name in G[0]}
        merge_layers(self.theta, self.bank, stacked, self.ratio, self.ridge)


@torch.no_grad()
def blocks(model: nn.Module, image: tuple[int, ...]) -> list[Block]:
    """Linear weights in the order in which they act, grouped by their names up to the last number: "blocks.3.mlp.fc1.weight" is of
    "blocks.3", "head.weight" of "head"."""
    order: list[str] = []
    layers = linear_layers(model)
    hooks = [layer.register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name, layer in layers.items()]
    model(torch.zeros(1, *image).to(next(model.parameters())))
    for hook in hooks:
        hook.remove()
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(order):
        found.setdefault(_prefix(name), []).append(name)
    return [(prefix, tuple(names)) for prefix, names in found.items()]


def _prefix(name: str) -> str:
    parts = name.split(".")[:-1]
    numbers = [position for position, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1] if numbers else parts)


def _below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{prefix}.") for prefix in prefixes)
