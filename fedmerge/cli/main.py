"""The console script `fedmerge` and its verbs. Only typer is imported here, so that `--help` is immediate."""

from __future__ import annotations

import json
import pkgutil
import threading
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedmerge.cli.simulate import Tools, guarded, names_of, simulate
from fedmerge.system.process import cores

app = typer.Typer(
    help="Share models instead of data: simulate hospitals that upload one expert each, and merge them per batch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def plugins(folder: str) -> Callable[[str], list[str]]:
    """Completion of names in a folder of plug-ins, of which none is imported: it has to be immediate."""
    place = Path(__file__).parents[1] / folder

    def beginning(incomplete: str) -> list[str]:
        names = [module.name for module in pkgutil.iter_modules([str(place)])]
        return [name for name in names if name.startswith(incomplete) and not name.startswith("_")]

    return beginning


class Document(StrEnum):
    """The two kinds of YAML."""

    scenario = "scenario"
    site = "site"


@app.callback()
def fedmerge() -> None:
    """Keep verbs even while there are few."""


app.command("simulate")(simulate)


@app.command("init")
@guarded
def init_folder(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where sites/ and scenarios/ are written; nothing is overwritten")],
    images: Annotated[Path, typer.Option(help="a folder of images, e.g. ROOT/<hospital>/<class>/*, or a table of them")],
    target: Annotated[
        str | None, typer.Option(help="the hospital that is the target: it does not train", show_default="chosen, and said")
    ] = None,
) -> None:
    """Write site files and a scenario for your own images into DIR, and say what was assumed."""
    from fedmerge.cli.first_scenario import first_scenario

    scenario, said = first_scenario(folder, images, target)
    typer.echo("\n".join(["assumed:", *(f"- {line}" for line in said)]))
    typer.echo(f"written: {scenario}, and its sites. Look at it, then: fedmerge plan {scenario}; fedmerge simulate {scenario}")


@app.command()
@guarded
def doctor(
    out: Annotated[Path, typer.Option(help="where runs are kept")] = Path("runs"),
    pool: Annotated[Path, typer.Option(help="where experts are kept")] = Path("pool"),
) -> None:
    """Check this machine and installation, and say how to mend what is not ready.

    Exit status 0 if backend local can run; otherwise 2.
    """
    from fedmerge.cli.doctor import examine

    counts = dict.fromkeys(("ok", "warn", "fail"), 0)
    for found in examine(pool, out):
        counts[found.of] += 1
        typer.secho(str(found), fg={"ok": None, "warn": "yellow", "fail": "red"}[found.of])
    able = "backend local cannot run before that is mended" if counts["fail"] else "backend local can run"
    typer.echo(f"{counts['fail']} failures, {counts['warn']} warnings: {able}")
    if counts["fail"]:
        raise typer.Exit(2)


@app.command()
@guarded
def plan(
    scenario: Annotated[Path, typer.Argument(help="the scenario's YAML")],
    seed: Annotated[int | None, typer.Option(min=0, help="instead of the scenario's seed")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the scenario; may be repeated")] = None,
    target: Annotated[str | None, typer.Option(help="another target; 'each': every site in turn")] = None,
    pool: Annotated[Path, typer.Option(help="where experts are kept")] = Path("pool"),
) -> None:
    """Show what SCENARIO will do, before anything is trained: sites, stream, what is in the pool, time and memory."""
    from fedmerge.cli.show_plan import show_previews
    from fedmerge.experiment.dry_run import previews
    from fedmerge.experiment.experiment import Overrides, load_each
    from fedmerge.experiment.overrides import single

    changes = Overrides(seed=seed, settings=tuple(single(text) for text in setting or ()), target=target)
    show_previews(previews(load_each(scenario, changes), pool, cores()))


@app.command()
@guarded
def sweep(  # noqa: PLR0913 - one parameter per option of the command line
    scenario: Annotated[Path, typer.Argument(help="the scenario's YAML")],
    seeds: Annotated[int | None, typer.Option(min=1, help="seeds 0, 1, 2, ...", show_default="the scenario's own")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE,VALUE,... of the scenario, e.g. methods.eam.gamma=1,10; may be repeated"),
    ] = None,
    targets: Annotated[
        str, typer.Option(help="'each': every site is the target once while the others train; or names separated by commas")
    ] = "",
    methods: Annotated[str, typer.Option(help="only these methods, separated by commas")] = "",
    out: Annotated[Path | None, typer.Option(help="folder of the sweep", show_default="runs/<scenario>-sweep")] = None,
    pool: Annotated[Path, typer.Option(help="folder of experts; those already in it are reused")] = Path("pool"),
    jobs: Annotated[int | None, typer.Option(min=1, help="streams at a time", show_default="all cores")] = None,
    log: Annotated[
        list[Tools] | None, typer.Option(help="also write the numbers of every cell for this tool; may be repeated")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    """Run SCENARIO for all combinations of seeds, settings and targets, and write one table.

    Experts are trained once and shared. A sweep that was cut off goes on where it stopped when the same command is given again.
    """
    from fedmerge.experiment.sweep import Sweep, cells_of, run_sweep

    cells = cells_of(scenario, range(seeds) if seeds else (), setting or [], targets)
    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    folder = out or Path("runs") / f"{scenario.stem}-sweep"
    run_sweep(Sweep(scenario, cells, names, folder, pool, jobs or cores(), names_of(log)), quiet)


@app.command()
@guarded
def diagnose(
    run: Annotated[Path, typer.Argument(help="folder of a finished run with 'expert' among its methods")],
    pool: Annotated[Path, typer.Option(help="where the run's experts are")] = Path("pool"),
    images: Annotated[int, typer.Option(min=1, help="images of the target on which losses between experts are measured")] = 256,
    predictions_only: Annotated[
        bool, typer.Option("--predictions-only", help="use the run's predictions alone, without experts and images")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="show no progress")] = False,
) -> None:
    """Tell why merging works in RUN, or does not: entropies, coefficients, drift, and barriers between experts.

    Writes diagnose.html, diagnose.json and plots into the run's folder.
    """
    from fedmerge.experiment.diagnose import diagnose_run as look

    look(run, None if predictions_only else pool, images, quiet)


@app.command("watch")
@guarded
def watch_run(
    run: Annotated[Path, typer.Argument(help="folder of a run or a sweep that is going on, or has ended")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="of the page, on this machine alone; 0: any that is free")] = 8787,
) -> None:
    """Show a page that follows RUN while it goes on: progress of hospitals, accuracy so far, and coefficients. Ctrl-C ends it.

    Of a sweep it shows the progress of all runs, and a page of each. It reads the folder, and can be
    reached from this machine alone.
    """
    from fedmerge.cli.watch import serving
    from fedmerge.system.process import Terminated

    with serving(run, port) as server:
        typer.echo(f"{run}: {server.url} (Ctrl-C ends it; the run goes on)")
        try:
            threading.Event().wait()
        except Terminated:
            raise
        except KeyboardInterrupt:
            typer.echo("no longer watched")


@app.command("compare")
@guarded
def compare_runs(
    first: Annotated[Path, typer.Argument(help="folder of a finished run")],
    second: Annotated[Path, typer.Argument(help="another, on the same stream: one target, one seed, the same images")],
    html: Annotated[Path | None, typer.Option(help="also write a page: one HTML file")] = None,
) -> None:
    """Set two runs side by side: every method's accuracy with the paired difference and its interval, and what else differs."""
    from fedmerge.errors import FolderError
    from fedmerge.report.comparison import compare, kept_run
    from fedmerge.report.pages.comparison import comparison_page, show_comparison
    from fedmerge.system.files import atomic_write, see_that_writable

    found = compare(kept_run(first), kept_run(second))
    show_comparison(found)
    if html:
        if html.is_dir():
            raise FolderError(f"--html: found the folder '{html}'; expected a file, e.g. {html / 'compare.html'}")
        see_that_writable(html.parent, "--html")
        atomic_write(html, comparison_page(found))
        typer.echo(f"page: {html}")


@app.command("inspect")
@guarded
def inspect_file(
    file: Annotated[Path, typer.Argument(help="weights: safetensors, or .pth of PyTorch")],
    model: Annotated[str | None, typer.Option(help="timm's name of the model that it may be of")] = None,
    scenario: Annotated[Path | None, typer.Option(help="a scenario that it may be an expert for")] = None,
) -> None:
    """Say what FILE is: format, tensors, head, and whether it fits a model or a scenario. It runs no code of the file.

    Exit status 0 if it holds weights, and fits what is named; otherwise 2.
    """
    from fedmerge.cli.weights_file import told_of

    for line in told_of(file, model, scenario):
        typer.echo(line)


@app.command()
@guarded
def mirage(
    pool: Annotated[Path, typer.Argument(help="a pool of experts")] = Path("pool"),
    out: Annotated[Path | None, typer.Option(help="write all numbers as JSON")] = None,
) -> None:
    """Tell from the weights in POOL alone whether averaging is at risk in this federation, and at which layers."""
    from fedmerge.experiment.averaging_risk import as_json, federations, show_risk

    found = federations(pool)
    show_risk(found)
    if out:
        out.write_text(json.dumps(as_json(found), indent=2), encoding="utf-8")


@app.command()
@guarded
def keys(
    site: Annotated[Path, typer.Argument(help="the site's YAML, e.g. sites/axial.yaml")],
    folder: Annotated[
        Path | None, typer.Option("--keys", help="where private keys are kept", show_default="FEDMERGE_KEYS, else keys")
    ] = None,
    renew: Annotated[bool, typer.Option("--renew", help="replace the key; signatures by the old one are no longer valid")] = False,
) -> None:
    """Make a key for SITE, with which it signs its uploads, and write the public half into its file."""
    from fedmerge.cli.site_files import give_key

    private, public = give_key(site, folder, renew)
    typer.echo(f"{site}: public_key: {public}")
    typer.echo(f"{private}: private key, for this hospital alone: it goes into no message, no log and no repository")


@app.command()
@guarded
def certificate(
    folder: Annotated[Path, typer.Argument(help="of the authority, ca.crt and ca.key, which is made if it is not there")],
    name: Annotated[str, typer.Argument(help="of the machine: NAME.crt and NAME.key are written")],
    addresses: Annotated[list[str], typer.Argument(help="host names and IP addresses at which others reach it")],
    days: Annotated[int, typer.Option(min=1, max=3650, help="how long it is valid")] = 90,
    renew: Annotated[bool, typer.Option("--renew", help="replace the one that is there")] = False,
) -> None:
    """Make a certificate for a machine of a Ray cluster or for a SuperLink, by an authority of your own."""
    from fedmerge.federated.security.certificates import issue

    for file in issue(folder, name, addresses, days, renew):
        typer.echo(str(file))


@app.command()
@guarded
def outline(
    site: Annotated[Path, typer.Argument(help="the hospital's own YAML, e.g. sites/axial.yaml")],
    seed: Annotated[int, typer.Option(min=0, help="the scenario's seed")] = 0,
) -> None:
    """Print SITE as the server may have it: what is known of its images, without any path."""
    from fedmerge.cli.site_files import site_outline as outlined

    typer.echo(outlined(site, seed), nl=False)


@app.command()
@guarded
def schema(document: Annotated[Document, typer.Argument(help="which YAML to describe")] = Document.scenario) -> None:
    """Print the JSON schema of a scenario or a site file, for editors."""
    from fedmerge.experiment.scenario import json_schema

    typer.echo(json.dumps(json_schema(document.value), indent=2))


@app.command()
@guarded
def methods(
    name: Annotated[
        str | None,
        typer.Argument(help="one method, for its formula and fields; all if left out", autocompletion=plugins("merging/methods")),
    ] = None,
) -> None:
    """Print the table of merging methods, or one method with its formula and its fields."""
    from fedmerge.cli.methods import describe, method_table

    if name:
        typer.echo(describe(name))
    else:
        method_table()


@app.command()
@guarded
def datasets(
    name: Annotated[
        str | None,
        typer.Argument(
            help="one of them, with all that is known of it; a table if left out", autocompletion=plugins("data/datasets")
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="all of them as docs/data-sets.md has them")] = False,
) -> None:
    """Print the public data sets that can be read by name: where to get them, their layout, classes, parts and licence."""
    from fedmerge.cli.datasets import dataset_page, dataset_table, describe_dataset

    if markdown:
        typer.echo(dataset_page(), nl=False)
    elif name:
        typer.echo(describe_dataset(name))
    else:
        dataset_table()
