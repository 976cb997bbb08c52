"""The report's pages from their templates, with one style for all."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any


def fill(name: str, filters: dict[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """The template `templates/<name>.html` with these values, escaped; an unknown name in it is an error."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters or {}
    here = resources.files("fedmerge.report.pages") / "templates"
    style = Markup(here.joinpath("style.css").read_text("utf-8"))
    return environment.from_string(here.joinpath(f"{name}.html").read_text("utf-8")).render(style=style, **values)
