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

from fedmerge.cli.simulate import Tools, guarded, kept_when_ended, names_of, simulate
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
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder for sites/ and scenarios/; no file is overwritten")],
    images: Annotated[Path, typer.Option(help="folder of images, e.g. ROOT/<hospital>/<class>/*, or a table of them")],
    target: Annotated[
        str | None,
        typer.Option(help="hospital that is the target; it trains no expert", show_default="the smallest, of three or more"),
    ] = None,
) -> None:
    """Write site files and a scenario for your own images into DIR, and print what was assumed."""
    from fedmerge.cli.first_scenario import first_scenario

    scenario, said = first_scenario(folder, images, target)
    typer.echo("\n".join(["assumed:", *(f"- {line}" for line in said)]))
    typer.echo(f"written: {scenario}, and its sites. Look at it, then: fedmerge plan {scenario}; fedmerge simulate {scenario}")


@app.command()
@guarded
def doctor(
    out: Annotated[Path, typer.Option(help="folder of the runs")] = Path("runs"),
    pool: Annotated[Path, typer.Option(help="folder of experts")] = Path("pool"),
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
def plan(  # noqa: PLR0913 - one parameter per option of the command line
    scenario: Annotated[Path, typer.Argument(help="YAML file of the scenario, e.g. scenarios/organs.yaml")],
    methods: Annotated[str, typer.Option(help="methods to run, separated by commas", show_default="those of the scenario")] = "",
    seed: Annotated[int | None, typer.Option(min=0, help="seed that replaces the scenario's")] = None,
    add_site: Annotated[list[str] | None, typer.Option(help="site file of one more hospital; may be repeated")] = None,
    without: Annotated[list[str] | None, typer.Option(help="name of a hospital to leave out; may be repeated")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE changes a key of the scenario, e.g. stream.batch_size=16; may be repeated"),
    ] = None,
    target: Annotated[str | None, typer.Option(help="hospital that is the target instead; 'each': every hospital in turn")] = None,
    pool: Annotated[Path, typer.Option(help="folder of experts")] = Path("pool"),
) -> None:
    """Check SCENARIO and show what it will do: sites, stream, experts in the pool, time and memory. Nothing is trained."""
    from fedmerge.cli.show_plan import show_previews
    from fedmerge.experiment.dry_run import previews
    from fedmerge.experiment.experiment import Overrides, load_each
    from fedmerge.experiment.overrides import single

    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    settings = tuple(single(text) for text in setting or ())
    changes = Overrides(seed, names, tuple(add_site or ()), settings, target, tuple(without or ()))
    show_previews(previews(load_each(scenario, changes), pool, cores()))


@app.command()
@guarded
def sweep(  # noqa: PLR0913 - one parameter per option of the command line
    scenario: Annotated[Path, typer.Argument(help="YAML file of the scenario, e.g. scenarios/organs.yaml")],
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="number of seeds: 3 runs seeds 0, 1 and 2; --set seed=3,5 names them",
            show_default="the scenario's own seed",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="KEY=VALUE,VALUE,... tries several values of a key, e.g. methods.eam.gamma=1,10; may be repeated"
        ),
    ] = None,
    targets: Annotated[
        str,
        typer.Option(
            help="hospitals that are the target in turn while the others train: names separated by commas, or 'each' for all",
            show_default="the scenario's own target",
        ),
    ] = "",
    methods: Annotated[str, typer.Option(help="methods to run, separated by commas", show_default="those of the scenario")] = "",
    out: Annotated[Path | None, typer.Option(help="folder of the sweep", show_default="runs/<scenario>-sweep")] = None,
    pool: Annotated[Path, typer.Option(help="folder of experts; those already in it are reused")] = Path("pool"),
    jobs: Annotated[int | None, typer.Option(min=1, help="number of streams at a time", show_default="all cores")] = None,
    log: Annotated[
        list[Tools] | None, typer.Option(help="tool for which the numbers of every run are written; may be repeated")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    """Run SCENARIO for all combinations of seeds, settings and targets, and write one table.

    Experts are trained once and shared. To continue a sweep that was cut off, give the same command again.
    """
    from fedmerge.experiment.sweep import Sweep, cells_of, run_sweep

    cells = cells_of(scenario, range(seeds) if seeds else (), setting or [], targets)
    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    folder = out or Path("runs") / f"{scenario.stem}-sweep"
    with kept_when_ended("what is done is kept; the same command goes on from there"):
        run_sweep(Sweep(scenario, cells, names, folder, pool, jobs or cores(), names_of(log)), quiet)


@app.command()
@guarded
def diagnose(
    run: Annotated[Path, typer.Argument(help="folder of a finished run with 'expert' among its methods")],
    pool: Annotated[Path, typer.Option(help="folder with the run's experts")] = Path("pool"),
    images: Annotated[
        int, typer.Option(min=1, help="number of the target's images for the losses on the way between experts")
    ] = 256,
    predictions_only: Annotated[
        bool, typer.Option("--predictions-only", help="use only the run's predictions, without experts and images")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="show no progress")] = False,
) -> None:
    """Show why merging works or fails in RUN: entropies, coefficients, drift, and barriers between experts.

    Writes diagnose.html, diagnose.json and plots into the run's folder.
    """
    from fedmerge.experiment.diagnose import diagnose_run as look

    look(run, None if predictions_only else pool, images, quiet)


@app.command("watch")
@guarded
def watch_run(
    run: Annotated[Path, typer.Argument(help="folder of a run or a sweep, running or finished")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="port of the page on this machine; 0: any free port")] = 8787,
) -> None:
    """Serve a page that follows RUN: progress of hospitals, accuracy so far, and coefficients. Ctrl-C ends it.

    The page of a sweep shows the progress of all runs and links to a page of each. Only this machine can reach the page.
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
    second: Annotated[Path, typer.Argument(help="folder of another run on the same stream: same target, same seed, same images")],
    html: Annotated[Path | None, typer.Option(help="HTML file for the comparison as a page")] = None,
) -> None:
    """Compare two runs: every method's accuracy, the paired difference with its interval, and the settings that differ."""
    from fedmerge.report.comparison import compare, kept_run
    from fedmerge.report.pages.comparison import comparison_page, show_comparison
    from fedmerge.system.files import atomic_write, see_that_file_writable

    if html:
        see_that_file_writable(html, "--html", "compare.html")
    found = compare(kept_run(first), kept_run(second))
    if html:  # before anything is printed: whoever reads it may stop reading
        atomic_write(html, comparison_page(found))
    show_comparison(found)
    if html:
        typer.echo(f"page: {html}")


@app.command("inspect")
@guarded
def inspect_file(
    file: Annotated[Path, typer.Argument(help="file of weights: safetensors, or .pth of PyTorch")],
    model: Annotated[str | None, typer.Option(help="model that the weights should fit, by its timm name")] = None,
    scenario: Annotated[Path | None, typer.Option(help="scenario for which the file should be an expert")] = None,
) -> None:
    """Show what FILE holds: format, tensors, head, and whether it fits a model or a scenario. No code of the file runs.

    Exit status 0 if FILE holds weights and fits the model or scenario; otherwise 2.
    """
    from fedmerge.cli.weights_file import told_of

    for line in told_of(file, model, scenario):
        typer.echo(line)


@app.command()
@guarded
def mirage(
    pool: Annotated[Path, typer.Argument(help="folder of experts")] = Path("pool"),
    out: Annotated[Path | None, typer.Option(help="JSON file for all numbers")] = None,
) -> None:
    """Estimate from the weights in POOL alone whether averaging is at risk in this federation, and at which layers."""
    from fedmerge.experiment.averaging_risk import as_json, federations, show_risk
    from fedmerge.system.files import atomic_write, see_that_file_writable

    if out:
        see_that_file_writable(out, "--out", "mirage.json")
    found = federations(pool)
    if out:
        atomic_write(out, json.dumps(as_json(found), indent=2))
    show_risk(found)


@app.command()
@guarded
def keys(
    site: Annotated[Path, typer.Argument(help="site file of the hospital, e.g. sites/axial.yaml")],
    folder: Annotated[
        Path | None, typer.Option("--keys", help="folder of private keys", show_default="FEDMERGE_KEYS, else keys")
    ] = None,
    renew: Annotated[bool, typer.Option("--renew", help="replace the key; signatures by the old one become invalid")] = False,
) -> None:
    """Make a pair of keys with which SITE signs its uploads, and write the public key into its site file."""
    from fedmerge.cli.site_files import give_key

    private, public = give_key(site, folder, renew)
    typer.echo(f"{site}: public_key: {public}")
    typer.echo(f"{private}: private key, for this hospital alone: it goes into no message, no log and no repository")


@app.command()
@guarded
def certificate(
    folder: Annotated[Path, typer.Argument(help="folder of your authority, ca.crt and ca.key; the first call makes it")],
    name: Annotated[str, typer.Argument(help="name of the machine; NAME.crt and NAME.key are written")],
    addresses: Annotated[list[str], typer.Argument(help="host names and IP addresses at which others reach the machine")],
    days: Annotated[int, typer.Option(min=1, max=3650, help="number of days that the certificate is valid")] = 90,
    renew: Annotated[bool, typer.Option("--renew", help="replace an existing certificate")] = False,
) -> None:
    """Make a TLS certificate for a machine of a Ray cluster or for a SuperLink, signed by an authority of your own."""
    from fedmerge.federated.security.certificates import issue

    for file in issue(folder, name, addresses, days, renew):
        typer.echo(str(file))


@app.command()
@guarded
def outline(
    site: Annotated[Path, typer.Argument(help="the hospital's own site file, e.g. sites/axial.yaml")],
    seed: Annotated[int, typer.Option(min=0, help="seed of the scenario")] = 0,
) -> None:
    """Print the outline of SITE that its hospital gives to the coordinator: facts about its images, and no path."""
    from fedmerge.cli.site_files import site_outline as outlined

    typer.echo(outlined(site, seed), nl=False)


@app.command()
@guarded
def schema(document: Annotated[Document, typer.Argument(help="kind of YAML file")] = Document.scenario) -> None:
    """Print the JSON schema of a scenario or a site file, for editors."""
    from fedmerge.experiment.scenario import json_schema

    typer.echo(json.dumps(json_schema(document.value), indent=2))


@app.command()
@guarded
def methods(
    name: Annotated[
        str | None,
        typer.Argument(help="name of a method; without it, all are listed", autocompletion=plugins("merging/methods")),
    ] = None,
) -> None:
    """Print the table of merging methods, or one method with its formula and its keys."""
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
        typer.Argument(help="name of a data set; without it, all are listed", autocompletion=plugins("data/datasets")),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print all of them as Markdown")] = False,
) -> None:
    """Print the public data sets that can be read by name: where to get them, their folders, classes, parts and license."""
    from fedmerge.cli.datasets import dataset_page, dataset_table, describe_dataset

    if markdown:
        typer.echo(dataset_page(), nl=False)
    elif name:
        typer.echo(describe_dataset(name))
    else:
        dataset_table()
