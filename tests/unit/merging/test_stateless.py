"""What a model keeps of its own accord does not reach the next call."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fedmerge.federated.model import ModelSpec, build
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.stateless import Stateless


class Forgetful(nn.Module):
    """Keeps what it has computed from its weight in every way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.by_key: dict[str, Tensor] = {}
        self.in_order: list[Tensor] = []
        self.none: Tensor | None = None
        self.named = {"scale": torch.ones(1)}

    def forward(self, x: Tensor) -> Tensor:
        if "w" not in self.by_key:
            self.by_key["w"] = self.weight * 2
        if not self.in_order:
            self.in_order.append(self.weight * 3)
        if self.none is None:
            self.none = self.weight * 5
        if not hasattr(self, "late"):
            self.late = self.weight * 7
        if float(self.named["scale"]) == 1:
            self.named["scale"] = self.weight.sum() + 1
        return x @ (self.by_key["w"] + self.in_order[0] + self.none + self.late) + self.named["scale"]


def test_every_way_to_keep_something_is_undone() -> None:
    model, x = Forgetful().eval(), torch.tensor([[1.0, 2.0]])
    for call in (Stateless(model), copy.deepcopy(Stateless(model))):
        for weight in (torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 3.0])):
            wanted = 17 * (x @ weight) + weight.sum() + 1
            torch.testing.assert_close(call({"weight": weight}, x), wanted)
    assert (model.by_key, model.in_order, model.none, hasattr(model, "late")) == ({}, [], None, False)


class Keeper(nn.Module):
    """Keeps twice its weight in one of many places, and looks there before it computes it anew."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.weight, self.place = nn.Parameter(torch.ones(2)), place
        self.kept, self.filled, self.factor = torch.zeros(2), False, 0.0
        self.pair: tuple[Tensor, ...] = ()
        self.nested: dict[str, list[Tensor]] = {"below": []}
        self.object = SimpleNamespace()
        self.register_buffer("table", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        twice = 2 * self.weight
        match self.place:
            case "a flag":
                self.kept, self.filled = (self.kept, True) if self.filled else (twice, True)
                return x @ self.kept
            case "a number":
                self.factor = self.factor or float(self.weight.sum())
                return x @ twice * self.factor
            case "a tuple":
                self.pair = self.pair or (twice,)
                return x @ self.pair[0]
            case "a list below":
                self.nested["below"] = self.nested["below"] or [twice]
                return x @ self.nested["below"][0]
            case "an object":
                vars(self.object).setdefault("kept", twice)
                return x @ self.object.kept
            case "a tensor":
                return x @ (self.kept if self.kept.any() else self.kept.copy_(twice))
        return x @ (self.table if self.table.any() else self.table.copy_(twice))


@pytest.mark.parametrize("place", ["a flag", "a number", "a tuple", "a list below", "an object", "a tensor", "a buffer"])
def test_wherever_it_is_kept_it_is_forgotten(place: str) -> None:
    first, x = Stateless(Keeper(place).eval()), torch.tensor([[1.0, 2.0]])
    with torch.no_grad():
        for call in (first, copy.deepcopy(first)):
            for weight in (torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 3.0])):
                wanted = Keeper(place)
                wanted.load_state_dict({"weight": weight})
                torch.testing.assert_close(call({"weight": weight}, x), wanted(x))


def test_after_an_error_nothing_is_kept_either() -> None:
    model = Forgetful().eval()
    with pytest.raises(RuntimeError):
        Stateless(model)({"weight": torch.ones(2)}, torch.ones(1, 3))
    assert model.by_key == {}


@pytest.mark.parametrize("name", ["tiny_vit_5m_224", "levit_128s", "efficientformer_l1", "efficientformerv2_s0", "efficientvit_m0"])
def test_families_that_cache_attention_biases(name: str) -> None:
    """An expert's and a merge's logits are those of a model that has loaded the same weights."""
    spec = ModelSpec(name=name)
    model = build(spec, 3, seed=0)
    states = [model.state_dict() | _drawn(model.state_dict(), seed) for seed in (1, 2)]
    x, bank = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)), Bank.of(model, states)
    wanted = [_loaded(spec, state, x) for state in (*states, bank.state_dict(bank.mix(torch.tensor([0.5, 0.5]))))]
    with torch.no_grad():
        found = [bank.row_logits(0, x), bank.row_logits(1, x), bank.forward(bank.mix(torch.tensor([0.5, 0.5])), x)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3


def _drawn(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    changed = ("attention_biases", "head.weight", "head.linear.weight", "head.l.weight")
    return {name: torch.randn(value.shape, generator=generator) for name, value in state.items() if name.endswith(changed)}


def _loaded(spec: ModelSpec, state: dict[str, Tensor], x: Tensor) -> Tensor:
    fresh = build(spec, 3, seed=0)
    fresh.load_state_dict(state)
    with torch.no_grad():
        return fresh.eval()(x)  # type: ignore[no-any-return]
