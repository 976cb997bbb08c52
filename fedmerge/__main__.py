"""The console script `fedmerge`, and `python -m fedmerge`. typer is imported late, so that its absence is one clear message."""

from __future__ import annotations

import sys

from fedmerge.errors import MissingExtra, extras_named


def command() -> None:
    """Entry point of the console script."""
    try:
        with extras_named():
            from fedmerge.cli.main import app
            from fedmerge.system.process import wait_briefly
    except MissingExtra as error:
        print(f"fedmerge: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    wait_briefly()
    app(prog_name="fedmerge")


if __name__ == "__main__":
    command()
