"""The front door: `python -m fedmerge.simulate SCENARIO`.

Exit status: 0 done; 2 the user's mistake, with one clear message and no traceback; 1 ours; 130 interrupted; 143 ended by SIGTERM,
129 by SIGHUP.
"""

from __future__ import annotations

import errno
import functools
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from typer.core import TyperArgument

from fedmerge.errors import FedmergeError, extras_named, quoted
from fedmerge.system.process import Terminated, ending_as_interrupt

A = ParamSpec("A")
INTERRUPTED = 130
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
UNUSABLE = (errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ESTALE, errno.ENXIO)
"""A path that nobody could use: too long, through a file, or on a disk that fails."""
LONGEST = 160
"""Characters of a path in a message."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _keep_help_of_arguments() -> None:
    """typer 0.20, the last that Flower allows, loses the help of arguments under click 8.4 and later."""
    begin = TyperArgument.__init__

    @functools.wraps(begin)
    def init(self: TyperArgument, **given: Any) -> None:
        begin(self, **given)
        self.help = given.get("help")

    TyperArgument.__init__ = init  # type: ignore[method-assign]


_keep_help_of_arguments()


class Backends(StrEnum):
    """Where hospitals and target run."""

    local = "local"
    simulation = "simulation"
    deployment = "deployment"


class Tools(StrEnum):
    """Tools for which the numbers of a run may be written, too."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"


def names_of(tools: list[Tools] | None) -> tuple[str, ...]:
    """Tools by their names."""
    return tuple(tool.value for tool in tools or ())


def guarded(verb: Callable[A, None]) -> Callable[A, None]:
    """Turn our errors into one message on stderr and an exit status."""

    @functools.wraps(verb)
    def run(*args: A.args, **kwargs: A.kwargs) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a name that a terminal cannot show ends no run
        try:
            with extras_named(), ending_as_interrupt():
                verb(*args, **kwargs)
        except FedmergeError as error:
            typer.echo(f"fedmerge: {error}{_of_locale(str(error))}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as ended:
            said = [str(ended) or "interrupted", *getattr(ended, "__notes__", [])]
            typer.echo(f"fedmerge: {'; '.join(said)}", err=True)
            raise typer.Exit(ended.exit_code if isinstance(ended, Terminated) else INTERRUPTED) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FORBIDDEN and error.filename:
                mend = "mend its rights, or choose another place"
                typer.echo(f"fedmerge: '{error.filename}' may not be used by this user ({error.strerror}); {mend}", err=True)
                raise typer.Exit(2) from None
            if isinstance(error, OSError) and error.errno in UNUSABLE and error.filename:
                place = quoted(_shortened(str(error.filename)))
                typer.echo(f"fedmerge: {place} cannot be used ({error.strerror}): choose another place", err=True)
                raise typer.Exit(2) from None
            if not _is_full(error):
                raise
            mend = "free some space, and give the same command again, with --resume for a run"
            typer.echo(f"fedmerge: the disk is full ({error}); what was written before stays readable: {mend}", err=True)
            raise typer.Exit(2) from None

    return run


@contextmanager
def kept_when_ended(told: str) -> Iterator[None]:
    """Say what is kept where Ctrl-C or a signal ends a command half-way, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as ended:
        ended.add_note(told)
        raise


def _of_locale(said: str) -> str:
    """A line for whoever has names of files that this locale reads otherwise than they were written: no other advice helps."""
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8" or said.isascii():
        return ""
    return f"\nthis locale reads names of files as {encoding}, not as UTF-8: if a name is there and not found, set PYTHONUTF8=1"


def _shortened(path: str) -> str:
    """A path that fits into a message."""
    return path if len(path) <= LONGEST else f"{path[: LONGEST // 2]}...{path[-LONGEST // 2 :]}"


def _is_full(error: Exception) -> bool:
    """Whether a file could not be written for lack of space; safetensors tells it in words alone."""
    return getattr(error, "errno", None) in FULL or "No space left on device" in str(error)


@guarded
def simulate(  # noqa: PLR0913 - one parameter per option of the command line
    scenario: Annotated[Path, typer.Argument(help="YAML file of the scenario, e.g. scenarios/organs.yaml")],
    out: Annotated[Path | None, typer.Option(help="folder of the run", show_default="runs/<scenario>-<seed>")] = None,
    pool: Annotated[Path, typer.Option(help="folder of experts; those already in it are reused")] = Path("pool"),
    methods: Annotated[str, typer.Option(help="methods to run, separated by commas", show_default="those of the scenario")] = "",
    seed: Annotated[int | None, typer.Option(min=0, help="seed that replaces the scenario's")] = None,
    add_site: Annotated[list[str] | None, typer.Option(help="site file of one more hospital; may be repeated")] = None,
    without: Annotated[list[str] | None, typer.Option(help="name of a hospital to leave out; may be repeated")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run where it stopped")] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE changes a key of the scenario, e.g. stream.batch_size=16; may be repeated"),
    ] = None,
    target: Annotated[str | None, typer.Option(help="hospital that is the target instead; it then trains no expert")] = None,
    experts_only: Annotated[bool, typer.Option("--experts-only", help="train the experts into the pool, and stop")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="number of threads of the target", show_default="OMP_NUM_THREADS, or all cores")
    ] = None,
    backend: Annotated[
        Backends | None,
        typer.Option(
            help="local: one process; simulation: Flower and Ray; deployment: real processes", show_default="the scenario's"
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="number of worker processes of backend local", show_default="all cores")
    ] = None,
    log: Annotated[
        list[Tools] | None,
        typer.Option(help="tool for which coefficients, accuracy and cost are written during the run; may be repeated"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    """Run SCENARIO: train the experts, merge them on the target's stream, and write a report.

    Hospitals whose expert is already in the pool do not train again.
    """
    from fedmerge.experiment.experiment import Overrides, RunOptions, load_experiment
    from fedmerge.experiment.overrides import single
    from fedmerge.experiment.run import prepare, run_experiment

    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    settings = tuple(single(text) for text in setting or ())
    where = backend.value if backend else None
    overrides = Overrides(seed, names, tuple(add_site or ()), settings, target, tuple(without or ()), where, jobs)
    experiment = load_experiment(scenario, overrides)
    folder = out or experiment.run_dir
    options = RunOptions(out=folder, pool=pool, resume=resume, quiet=quiet, threads=threads, log=names_of(log))
    again = "" if experts_only else "; the same command with --resume goes on from there"
    with kept_when_ended(f"experts that have arrived are in the pool{again}"):
        if experts_only:
            prepare(experiment, options)
        else:
            run_experiment(experiment, options)


def simulate_alone() -> None:
    """Entry point of `python -m fedmerge.simulate`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(simulate)
    app(prog_name="python -m fedmerge.simulate")
