"""Pages of the documentation that are read from the code: methods, YAML keys, commands; and those that lie beside `docs/`.

mkdocs runs this file as a hook (`mkdocs.yml`). What it writes is nowhere in the repository, so that no page can be out of date.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from fedmerge.cli.main import app
from fedmerge.cli.methods import row, takes
from fedmerge.data.datasets._file_source import FileSource
from fedmerge.experiment.scenario import json_schema
from fedmerge.federated.attacks._base import ATTACKS
from fedmerge.federated.defenses._base import DEFENSES
from fedmerge.merging.methods._base import METHODS
from fedmerge.registry import EXAMPLES, Folder

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads a hook by its path
from method_figures import figure

ROOT = Path(__file__).resolve().parents[1]
BESIDE = {"index.md": "README.md", "extend.md": "CONTRIBUTING.md", "security.md": "SECURITY.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that are files of the repository's root."""


WIDE = "<style>.md-typeset td:nth-child(2) { min-width: 11rem; }</style>\n"
"""The column of meanings, beside long lists of values."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in `docs/`."""
    pages = {name: (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](") for name, source in BESIDE.items()}
    pages |= {"reference/methods.md": methods(), "reference/yaml.md": keys(), "reference/command-line.md": commands()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links to files of the root lead to their pages; those without one are named without a link."""
    for page, source in BESIDE.items():
        found = re.compile(rf"\]\(((?:\.\./)*){re.escape(source)}")
        markdown = found.sub(lambda link, page=page: f"]({link[1].removeprefix('../')}{page}", markdown)
    return re.sub(
        r"\[([^\]]*)\]\((?:\.\./)*(?:LICENSE|CITATION\.cff|CODE_OF_CONDUCT\.md|benchmarks/[^)]*|examples/[^)]*)\)", r"\1", markdown
    )


def on_post_page(output: str, **_: object) -> str:
    """No page asks another machine for anything: the theme's shim for search in files opened without a server is left out."""
    return re.sub(r'<script src="https://[^"]*"></script>', "", output)


def methods() -> str:
    """The table of all methods, and each with its formula and its fields."""
    lines = [
        "# Methods",
        "",
        "Every method is one file in `fedmerge/merging/methods/` that reads like its paper's equations. K is the number of",
        "experts. Forwards are those of a batch through one model, if the method runs alone; together, methods share the experts'",
        "logits.",
        "",
        "The figures show what every method does with the same three experts: handwritten digits of 8 x 8 pixels, at hospitals",
        "whose scanners leave an image as it is (north), make it negative (east), or turn it upside down (south). The stream of",
        "24 batches drifts from north over east to south. The figures show how a method works, not how good it is.",
        "",
        "| method | merges | needs beyond weights | gradients | forwards per batch | paper |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| [`{name}`](#{name}) | {' | '.join(row(name)[1:])} |" for name in METHODS.names]
    for name in METHODS.names:
        kind = METHODS.load(name)
        first = inspect.getdoc(inspect.getmodule(kind)) or ""
        words, _, example = (inspect.getdoc(kind) or "").partition(EXAMPLES)
        lines += ["", f"## {name} {{#{name}}}", "", *_block(first), "", *_block(words), "", f"*{kind.paper}*", "", figure(name), ""]
        lines += ["```pycon", example, "```", ""] if example else []
        lines += _fields(kind.model_json_schema(), without=("kind",))
    return "\n".join(lines)


def _block(text: str) -> list[str]:
    """A docstring, paragraph by paragraph: words run on, and formulas stand as they are, with what is said of them near by."""
    lines = []
    for part in text.split("\n\n"):
        if re.search(r"(?m)^    |\S  +\S", part):
            lines += [
                "",
                "```{.text .formula}",
                *(re.sub(r"(?<=\S) {9,}(?=\S)", "   ", line) for line in textwrap.dedent(part).splitlines()),
                "```",
            ]
        else:
            lines += ["", " ".join(part.split()).replace("&", "&amp;").replace("<", "&lt;").replace("*", "\\*")]
    return lines[1:]


def keys() -> str:
    """Every key of a scenario and of a site file, and of their parts."""
    lines = [
        "# YAML keys",
        "",
        WIDE,
        "All keys of scenarios and site files. `fedmerge schema scenario` and `fedmerge schema site` print them as JSON schemas,",
        "which editors use to complete and check a file.",
        "",
    ]
    parts: dict[str, Any] = {}
    for title, document in (("A scenario", "scenario"), ("A site file", "site")):
        schema = json_schema(document)
        parts |= schema.pop("$defs", {})
        lines += [f"## {title}", "", *_fields(schema), ""]
    for folder, title in ((DEFENSES, "Defenses"), (ATTACKS, "Attacks")):
        lines += [f"## {title}", "", *_plugins(folder)]
    shared = FileSource.model_json_schema()["properties"]
    lines += ["## Image files", "", "Keys of every source whose images are files.", ""]
    lines += [*_fields({"properties": shared}, without=("kind",)), ""]
    lines += ["## Parts", ""]
    for name, schema in sorted(parts.items()):
        fields = schema.get("properties", {})
        whole = not shared.keys() <= fields.keys()
        more = [] if whole else ["It also has the keys of [image files](#image-files).", ""]
        own = {key: field for key, field in fields.items() if whole or shared.get(key) != field}
        lines += [f"### {name} {{#{name.lower()}}}", "", schema.get("description", "").split("\n\n")[0], "", *more]
        lines += [*_fields(schema | {"properties": own}), ""]
    return "\n".join(lines)


def _plugins(folder: Folder[Any]) -> Iterator[str]:
    for name in folder.names:
        kind = folder.load(name)
        yield from (f"### {name}", "", (inspect.getdoc(kind) or "").split("\n\n")[0], "", *_fields(kind.model_json_schema()), "")


def _fields(schema: Mapping[str, Any], without: tuple[str, ...] = ()) -> list[str]:
    fields = {name: field for name, field in schema.get("properties", {}).items() if name not in without}
    if not fields:
        return []
    lines = ["| key | meaning | value | default |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "required" if name in schema.get("required", ()) else f"`{json.dumps(field.get('default'))}`"
        default = "see `fedmerge schema`" if len(default) > 60 else "" if name == "kind" else default
        said = field.get("description", "the name that selects it" if name == "kind" else "")
        lines.append(f"| `{name}` | {_cell(said)} | {_cell(_type(field))} | {_cell(default)} |")
    return lines


def _type(field: Mapping[str, Any]) -> str:
    """What a field takes, with links."""
    return takes(field, lambda name: f"[{name}](yaml.md#{name.lower()})" if name in PARTS else name, lambda value: f"`{value}`")


PARTS = {name for document in ("scenario", "site") for name in json_schema(document)["$defs"]}


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def commands() -> str:
    """Every command with its arguments and options."""
    whole = typer.main.get_command(app)
    assert isinstance(whole, click.Group)
    lines = [
        "# Command line",
        "",
        "All commands of `fedmerge`. `python -m fedmerge.simulate` is the same as `fedmerge simulate`.",
        "",
        "| exit status | means |",
        "|---|---|",
        "| 0 | done |",
        "| 1 | the target or the cluster failed, as one message says; with a traceback, an error in fedmerge |",
        "| 2 | something that you can mend: one message says what, without a traceback |",
        "| 130, 143, 129 | ended by Ctrl-C, SIGTERM, SIGHUP |",
        "",
    ]
    for name, command in whole.commands.items():
        context = click.Context(command, info_name=f"fedmerge {name}")
        text = inspect.cleandoc(command.help or "")
        lines += [f"## {name}", "", *_block(text), "", "```", command.get_usage(context).removeprefix("Usage: "), "```", ""]
        lines += ["| argument or option | meaning | default |", "|---|---|---|"]
        for one in command.params:
            said = _cell(getattr(one, "help", None) or "")
            flags = ", ".join(f"`{flag}`" for flag in (*one.opts, *one.secondary_opts))
            default = "" if one.default is None or one.required or callable(one.default) else f"`{one.default}`"
            words = getattr(one, "show_default", None)
            default = words if isinstance(words, str) else "required" if one.required else default
            lines.append(
                f"| {flags if isinstance(one, click.Option) else f'`{one.human_readable_name}`'} | {said} | {_cell(default)} |"
            )
        lines.append("")
    return "\n".join(lines)
