"""The table of merging methods, from the folder itself: what each declares, and the fields of one."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.table import Table

from fedmerge.merging.methods._base import METHODS, Adaptive, Method, Online, Output, Static
from fedmerge.registry import Plugin

KINDS: dict[type[Method], str] = {Static: "once", Adaptive: "per batch", Online: "online", Output: "predictions"}
"""What is merged, and when."""


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
    return name, merges, needs, "yes" if kind.gradient else "no", kind.cost, kind.paper


def describe(name: str) -> str:
    """A method's paper, its docstring with formula, and its fields. Raises ScenarioError for an unknown name."""
    kind = METHODS.load(name)
    first = inspect.getdoc(inspect.getmodule(kind)) or ""
    return "\n".join([f"{name}: {first}", kind.paper, "", inspect.getdoc(kind) or "", "", "Fields:", *fields_of(kind)])


def fields_of(kind: type[Plugin]) -> list[str]:
    """A line for each key of a plug-in: what it takes, its default, and what it is for."""
    lines = []
    for field, info in kind.model_fields.items():
        default = "" if info.is_required() else f" = {info.default!r}"
        lines.append(f"  {field}: {_shown(info.annotation)}{default}  {info.description or ''}".rstrip())
    return lines


def _shown(annotation: object) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace("typing.", "").replace("Literal", "one of ")
