"""The report's pages from their templates, with one style and one frame for all."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

CONTENTS = "<!-- contents -->"

FEWEST = 3
"""Sections that are worth a list of them."""


def fill(name: str, filters: dict[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """The template `templates/<name>.html` with these values, escaped; an unknown name in it is an error."""
    from markupsafe import Markup

    environment = _environment()
    environment.filters |= filters or {}
    template = environment.get_template(f"{name}.html")
    page = template.render(style=Markup(_read("style.css")), contents=Markup(CONTENTS), **values)
    return page.replace(CONTENTS, _contents(page), 1)


def _read(file: str) -> str:
    return (resources.files("fedmerge.report.pages") / "templates" / file).read_text("utf-8")


@cache
def _environment() -> Environment:
    """One for all pages: it translates each template once in a process."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    loader = FunctionLoader(_read)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    parts: Any = environment.get_template("parts.html").module
    environment.globals |= {"wide": parts.wide, "plot": parts.plot}
    return environment


def _contents(page: str) -> str:
    """Links to a page's sections: a keyboard or a screen reader gets there without passing all that lies between."""
    sections = re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', page)
    if len(sections) < FEWEST:
        return ""
    links = "".join(f'<li><a href="#{anchor}">{text}</a></li>' for anchor, text in sections)
    return f'<nav aria-label="On this page"><details><summary>On this page</summary><ul>{links}</ul></details></nav>'
