"""The command line explains itself."""

from __future__ import annotations

import click
import typer

from fedmerge.cli.main import app


def test_every_verb_argument_and_option_says_what_it_is() -> None:
    whole = typer.main.get_command(app)
    assert isinstance(whole, click.Group)
    for verb in whole.commands.values():
        assert verb.help and verb.help.partition("\n")[0].endswith(".")
        assert [one.name for one in verb.params if not getattr(one, "help", None)] == []
