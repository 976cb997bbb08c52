"""The console script `fedmerge` and its verbs. Only typer is imported here, so that `--help` is immediate."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from fedmerge.simulate import guarded, simulate

app = typer.Typer(
    help="Share models instead of data: simulate hospitals that upload one expert each, and merge them per batch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Document(StrEnum):
    """The two kinds of YAML."""

    scenario = "scenario"
    site = "site"


@app.callback()
def fedmerge() -> None:
    """Keep verbs even while there are few."""


app.command("simulate")(simulate)


@app.command()
@guarded
def schema(document: Annotated[Document, typer.Argument(help="which YAML to describe")] = Document.scenario) -> None:
    """Print the JSON schema of a scenario or a site file, for editors."""
    from fedmerge.scenario import json_schema

    typer.echo(json.dumps(json_schema(document.value), indent=2))


@app.command()
@guarded
def methods(
    name: Annotated[str | None, typer.Argument(help="one method, for its formula and fields; all if left out")] = None,
) -> None:
    """Print the table of merging methods, or one method with its formula and its fields."""
    from fedmerge.catalogue import describe, table

    if name:
        typer.echo(describe(name))
    else:
        table()


def main() -> None:
    """Entry point of the console script."""
    app()
