"""The table of merging methods, from the folder itself: what each declares, and the fields of one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from fedmerge.errors import MethodError, nearest
from fedmerge.merging.methods._base import METHODS, Adaptive, Method, Online, Output, Static
from fedmerge.registry import Plugin
from fedmerge.report.terminal import console

KINDS: dict[type[Method], str] = {Static: "once", Adaptive: "per batch", Online: "online", Output: "predictions"}
"""What is merged, and when."""

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def method_table() -> None:
    """Print one row for each method: when it merges, what it needs, whether it has gradients, forwards per batch, and the paper."""
    out = console(width=160)
    shown = Table(title="Merging methods: one file each in fedmerge/merging/methods")
    for name in ("method", "merges", "needs beyond weights", "gradients", "forwards per batch", "paper"):
        shown.add_column(name, no_wrap=name in ("method", "merges", "forwards per batch"))
    for name in METHODS.names:
        shown.add_row(*row(name))
    out.print(shown)
    out.print(
        "K: experts. Forwards of a batch if the method runs alone; together, methods share the experts' logits.", markup=False
    )
    out.print("`fedmerge methods NAME` shows a method's formula and its fields.", markup=False)


def row(name: str) -> tuple[str, ...]:
    """The cells of one method, with its default hyper-parameters."""
    kind = METHODS.load(name)
    method = kind()
    merges = next(text for base, text in KINDS.items() if issubclass(kind, base))
    needs = ", ".join(sorted(method.needed)) or "nothing"
    return name, merges, needs, "yes" if kind.gradient else "no", kind.cost, kind.paper


def describe(name: str) -> str:
    """A method's paper, its docstring with formula, and its fields. Raises MethodError for an unknown name."""
    if name not in METHODS.names:
        raise MethodError(f"method: found '{name}'; expected a known one: {nearest(name, METHODS.names)}")
    kind = METHODS.load(name)
    first = inspect.getdoc(inspect.getmodule(kind)) or ""
    return "\n".join([f"{name}: {first}", kind.paper, "", inspect.getdoc(kind) or "", "", "Fields:", *fields_of(kind)])


def fields_of(kind: type[Plugin]) -> list[str]:
    """A line for each key of a plug-in: what it is for, what it takes, and its default."""
    schema = kind.model_json_schema()
    lines = []
    for name, field in schema.get("properties", {}).items():
        if name != "kind":  # the plug-in's own name
            default = "required" if name in schema.get("required", ()) else f"default {json.dumps(field.get('default'))}"
            lines.append(f"  {name}: {field.get('description', '')} ({takes(field)}; {default})")
    return lines


def takes(field: Mapping[str, Any], part: Callable[[str], str] = str, code: Callable[[str], str] = str) -> str:
    """What a key takes, in words, from its JSON schema. part: how the name of a mapping's schema is written; code: a value."""
    if reference := field.get("$ref"):
        return part(reference.rpartition("/")[2])
    if choices := field.get("enum"):
        return ", ".join(code(str(choice)) for choice in choices)
    if "const" in field:
        return code(str(field["const"]))
    if several := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(takes(one, part, code) for one in several if one.get("type") != "null"))
    if field.get("type") == "array":
        return f"list of {takes(field['items'], part, code)}" if "items" in field else "list"
    bounds = [f"{sign} {field[key]}" for key, sign in BOUNDS.items() if key in field]
    return " ".join([{"object": "mapping"}.get(field.get("type", ""), field.get("type", "anything")), ", ".join(bounds)]).strip()
