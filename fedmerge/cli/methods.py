"""The table of merging methods, from the folder itself; what a batch costs is counted by running every method on a small model."""

from __future__ import annotations

import inspect
from contextlib import nullcontext

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.curvature.gram import linear_layers
from fedmerge.merging.evidence import Answer, Evidence
from fedmerge.merging.methods._base import METHODS, Adaptive, Method, Online, Output, Static
from fedmerge.merging.per_sample.dispatch import PerSample
from fedmerge.merging.predict import predict, rows_of

KINDS: dict[type[Method], str] = {Static: "once", Adaptive: "per batch", Online: "online", Output: "predictions"}
"""What is merged, and when."""

SIZES = (2, 3, 5)
"""Numbers of experts with which costs are counted."""


def method_table() -> None:
    """Print one row for each method: when it merges, what it needs, whether it has gradients, forwards per batch, and the paper."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    shown = Table(title="Merging methods: one file each in fedmerge/merging/methods")
    shown.add_column("method", no_wrap=True)
    shown.add_column("merges", no_wrap=True)
    shown.add_column("needs beyond weights")
    shown.add_column("gradients")
    shown.add_column("forwards per batch", no_wrap=True)
    shown.add_column("paper")
    for name in METHODS.names:
        shown.add_row(*row(name))
    console.print(shown)
    console.print(
        "K: experts. Forwards of a batch if the method runs alone; together, methods share the experts' logits.", markup=False
    )
    console.print("`fedmerge methods NAME` shows a method's formula and its fields.", markup=False)


def row(name: str) -> tuple[str, ...]:
    """The cells of one method, with its default hyper-parameters."""
    kind = METHODS.load(name)
    method = kind()
    merges = next(text for base, text in KINDS.items() if issubclass(kind, base))
    needs = ", ".join(sorted(method.needed)) or "nothing"
    return name, merges, needs, "yes" if kind.gradient else "no", method_cost(method), kind.paper


def method_cost(method: Method) -> str:
    """Forwards of a batch as a formula in K."""
    counted = {K: _forwards(method, K) for K in SIZES}
    slope = counted[3] - counted[2]
    rest = counted[2] - 2 * slope
    assert all(count == slope * K + rest for K, count in counted.items())
    part = {0: "", 1: "K"}.get(slope, f"{slope}K")
    return " + ".join(text for text in (part, str(rest) if rest or not part else "") if text)


def describe(name: str) -> str:
    """A method's paper, its docstring with formula, and its fields. Raises ScenarioError for an unknown name."""
    kind = METHODS.load(name)
    fields = [
        f"  {field}: {_shown(info.annotation)} = {info.default!r}  {info.description or ''}".rstrip()
        for field, info in kind.model_fields.items()
    ]
    first = inspect.getdoc(inspect.getmodule(kind)) or ""
    return "\n".join([f"{name}: {first}", kind.paper, "", inspect.getdoc(kind) or "", "", "Fields:", *fields])


def _shown(annotation: object) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace("typing.", "").replace("Literal", "one of ")


@torch.no_grad()
def _forwards(method: Method, K: int) -> int:
    bank = _bank(K)
    batch = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    (kept, *_) = rows_of([method], bank).values()
    evidence = Evidence(bank, batch)
    truth = Answer(torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long))
    with evidence.billed() as bill, evidence.opened(truth) if "labels" in method.needed else nullcontext():
        found = predict(kept, evidence, PerSample(bank, "mixture"))
    return kept.method.forwards_alone(bill.forwards, K) + found.forwards


def _bank(K: int) -> Bank:
    """K random linear classifiers with all that a method may ask for."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.GELU(), nn.Linear(5, 3))
    states = [{n: torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()} for _ in range(K + 1)]
    squares = [{n: t**2 for n, t in state.items()} for state in states[:K]]
    grams = [{n: torch.eye(layer.in_features) for n, layer in linear_layers(model).items()} for _ in range(K)]
    statistics = {"fisher": squares, "soup": states[:K], "gram": grams, "gram_rounds": grams}
    head = ("3.weight", "3.bias")
    return Bank.of(model, states[:K], states[K], statistics=statistics, counts=[1] * K, temperatures=[1.0] * K, head=head)
