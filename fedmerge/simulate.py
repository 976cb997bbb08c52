"""`python -m fedmerge.simulate SCENARIO`: the main job, as in `fedmerge simulate`."""

from __future__ import annotations

import sys

from fedmerge.errors import MissingExtra, extras_named


def command_alone() -> None:
    """Entry point of `python -m fedmerge.simulate`."""
    try:
        with extras_named():
            from fedmerge.cli.simulate import simulate_alone
            from fedmerge.system.process import wait_briefly
    except MissingExtra as error:
        print(f"fedmerge: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    wait_briefly()
    simulate_alone()


if __name__ == "__main__":
    command_alone()
