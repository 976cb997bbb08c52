"""A preview on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from fedmerge.experiment.dry_run import Cost, Preview
from fedmerge.report.terminal import console, duration, histogram, site_table, stripes

IN_POOL = {True: "in the pool", False: "trains", None: "known after theta_0"}


def show_previews(found: Sequence[Preview]) -> None:
    """Print a plan; where a scenario leaves out one domain after the other, that of each, and what all take together."""
    for number, one in enumerate(found):
        if len(found) > 1:
            console().print(f"\ntarget {number + 1} of {len(found)}: {one.experiment.target.name}", markup=False)
        show_preview(one)
    if len(found) > 1:
        sites = {site: there for one in found for site, there in one.trained.items()}
        count, pooled = len(found[0].sites), sum(there is True for there in sites.values())
        experts = f"{len(found)} runs of {count} experts each, of {len(sites)} that are trained once and shared"
        console().print(f"\n{experts} ({pooled} are in the pool)", markup=False)
        console().print(f"estimate for all: {_told(Cost.of_all([one.cost for one in found]))}", markup=False)


def show_preview(found: Preview) -> None:
    """Print sites, stream, rows and cost."""
    experiment, cost = found.experiment, found.cost
    out = console()
    out.print(f"{experiment.scenario.name}, seed {experiment.scenario.seed}: {experiment.scenario.question}", markup=False)
    millions = found.parameters / 1e6
    out.print(
        f"model {experiment.scenario.model.name}, {millions:.2f} million parameters, {len(experiment.classes)} classes",
        markup=False,
    )
    for name, classes in experiment.tasks.items():
        out.print(f"task of {name}: {', '.join(classes)}", markup=False)
    rows = []
    for one in (*found.sites, found.target):
        trains = one is not found.target
        rows.append(
            {
                "site": one.site if trains else f"{one.site} (target)",
                "images": str(one.images),
                "patients": "" if one.groups is None else str(one.groups),
                "train": str(one.train) if trains else "",
                "validation": str(one.validation) if trains else "",
                "labels": histogram(one.per_class),
                "domains": ", ".join(f"{name} {count}" for name, count in one.per_domain.items() if count),
                "expert": _expert(found, one.site) if trains else "never trains",
            }
        )
    out.print(site_table(rows))
    for remark in experiment.remarks():
        out.print(remark, markup=False)
    mix = found.mix
    kind = experiment.scenario.stream.kind()
    out.print(
        f"stream: {kind}, {len(mix.classes)} batches, {mix.samples} images, {mix.unused} unused; time goes from left to right"
    )
    for line in [*stripes(mix.domain_names, mix.domains), "", *stripes(experiment.target_classes, mix.classes)]:
        out.print(f"  {line}", markup=False)
    for event in sorted(experiment.scenario.events, key=lambda event: event.at):
        out.print(f"before batch {event.at}: {event.words}", markup=False)
    names = ", ".join(method.key for method in experiment.scenario.methods)
    out.print(f"methods: {names}", markup=False)
    for strategy in found.rounds:
        count = f"{strategy.rounds} round{'s' if strategy.rounds > 1 else ''}"
        steps = f"{strategy.steps:.0f} local steps a hospital in all"
        out.print(f"federated: {strategy.key}, {count}, {steps}: {strategy.words}", markup=False)
    out.print(f"estimate for this machine: {_told(cost)}", markup=False)


def _expert(found: Preview, name: str) -> str:
    there = found.trained[name]
    brings = any(site.expert for site in found.experiment.sites if site.name == name)
    return "brings it" if brings and not there else IN_POOL[there]


def _told(cost: Cost) -> str:
    training = f"training about {duration(cost.training_s)}" if cost.training_s else "nobody trains"
    return f"{training}, stream about {duration(cost.stream_s)}, {cost.peak_bytes / 2**30:.1f} GiB at the peak"
