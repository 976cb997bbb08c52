"""A run from beginning to end: gather experts, let the target consume its stream, report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, StrictBool

from fedmerge.adaptation.expert_loader import check_limit
from fedmerge.adaptation.ray.cluster import preflight
from fedmerge.adaptation.ray.placement import Wanted
from fedmerge.adaptation.shard import check_shards
from fedmerge.errors import extras_named
from fedmerge.experiment.experiment import Experiment, Overrides, RunOptions, load_experiment
from fedmerge.experiment.run_dir import RunFolder
from fedmerge.experiment.stream_phase import Seen, Sent, consume, read_generalist, refuse_late_events
from fedmerge.experiment.training_phase import (
    backend_of,
    load_experts,
    make_theta_0,
    own_steps,
    run_strategies,
    site_task,
    train_sites,
    vetted,
)
from fedmerge.federated.client.site_log import written_since
from fedmerge.federated.messages import Backend, Initial, Outcome, SiteTask
from fedmerge.federated.pool.experts import Expert
from fedmerge.federated.pool.global_models import GlobalModel
from fedmerge.federated.security.audit import Item, audit_shown, write_audit
from fedmerge.federated.site import Site
from fedmerge.registry import Spec
from fedmerge.report.batch_log import Ledger
from fedmerge.report.pages.run import write
from fedmerge.report.records import RunRecord, SiteRow
from fedmerge.report.run_log import RunLog, Tool, run_log
from fedmerge.report.terminal import Terminal, shown_path
from fedmerge.system.notebook import html_table
from fedmerge.system.torch_settings import own_settings
from fedmerge.system.yaml_loader import check


def prepare(experiment: Experiment, options: RunOptions, backend: Backend | None = None) -> None:
    """Only the hospitals' part: afterwards all experts and global models are in the pool, with what `uploads` ask for."""
    refuse_late_events(experiment)
    with RunFolder(options.out, experiment, keep=options.resume) as folder:
        terminal = Terminal(options.quiet, status=folder.status)
        if backend is None and experiment.scenario.backend == "simulation":
            preflight(Wanted(hospitals=True))
        backend = backend or backend_of(experiment.scenario)
        initial, tasks, _ = hospitals(experiment, options, folder, terminal, backend)
        rounds(experiment, tasks, initial, options, folder, terminal, backend)


def refuse_what_has_no_place(experiment: Experiment) -> None:
    """Before anybody trains. Raises ScenarioError for what does not go into the target's memory, its shards, or Ray's nodes."""
    scenario, shards = experiment.scenario, experiment.scenario.target.shards or 1
    check_shards(shards, len(experiment.sites), scenario.methods, scenario.per_sample, scenario.target.max_bytes)
    anchors, limit = 1 + (scenario.generalist is not None), scenario.target.max_bytes
    check_limit(
        limit,
        len(experiment.sites),
        scenario.model,
        len(experiment.classes),
        scenario.methods,
        len(scenario.federated),
        anchors,
        scenario.target.precision or "float32",
    )
    if scenario.backend != "local":
        preflight(Wanted(scenario.target.gpus, scenario.target.resource, shards, hospitals=True))


def hospitals(
    experiment: Experiment, options: RunOptions, folder: RunFolder, terminal: Terminal, backend: Backend
) -> tuple[Initial, list[SiteTask], dict[str, Outcome]]:
    """theta_0 to all sites, and their experts into the pool; the tasks of those that have one now. Raises SiteError."""
    folder.manifest["remarks"] = experiment.remarks()
    for remark in folder.manifest["remarks"]:
        terminal.say(remark)
    with folder.phase("initialization"):
        initial = make_theta_0(experiment, options, terminal, backend)
    tasks = [site_task(experiment, number, initial) for number in range(len(experiment.sites))]
    with folder.phase("hospitals"):
        outcomes = train_sites(experiment, tasks, initial, options, terminal, backend)
    folder.manifest["trained"] = {name: outcome.trained for name, outcome in outcomes.items()}
    folder.manifest["absent"] = {name: outcome.reason for name, outcome in outcomes.items() if outcome.reason}
    folder.manifest["asked_again"] = {name: outcome.tries - 1 for name, outcome in outcomes.items() if outcome.tries > 1}
    return initial, [task for task in tasks if not outcomes[task.site.name].reason], outcomes


def rounds(
    experiment: Experiment,
    tasks: list[SiteTask],
    initial: Initial,
    options: RunOptions,
    folder: RunFolder,
    terminal: Terminal,
    backend: Backend,
) -> tuple[GlobalModel, ...]:
    """The models of federated strategies, and what they cost each hospital, into the manifest."""
    if not experiment.scenario.federated:
        return ()
    with folder.phase("federated"):
        models = run_strategies(experiment, tasks, initial, options, terminal, backend)
    folder.manifest["federated"] = {model.strategy.key: model.as_record() for model in models}
    return models


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    Attributes
    ----------
    path : Path
        The run folder, with `report.html`, `summary.json`, `manifest.json` and all predictions.
    summary : dict
        The content of `summary.json`.

    Examples
    --------
    >>> from pathlib import Path
    >>> from fedmerge import RunResult
    >>> rows = {"mean": {"accuracy": 0.8}, "eam": {"accuracy": 0.9}}
    >>> [row["method"] for row in RunResult(Path("runs/organs-1"), {"methods": rows}).table]
    ['eam', 'mean']
    """

    path: Path
    summary: dict[str, Any]

    @property
    def report_path(self) -> Path:
        """The report, one HTML file."""
        return self.path / "report.html"

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row for each method, best accuracy first: its name below `method`, and its entry of the summary."""
        rows = [{"method": name, **row} for name, row in self.summary["methods"].items()]
        return sorted(rows, key=lambda row: -(row["accuracy"] if row["accuracy"] is not None else -1.0))

    def _repr_html_(self) -> str:
        """The table as notebooks show it: accuracy with its interval, and what it is above the mean."""
        shown = []
        for row in self.table:
            low, high = row["ci95"] or (None, None)
            above = (row["vs_mean"] or {}).get("difference")
            shown.append((row["method"], *(_points(value) for value in (row["accuracy"], low, high, above))))
        columns = ["method", "accuracy, %", "from", "to", "minus the mean, points"]
        return html_table(f"{self.summary['scenario']}, seed {self.summary['seed']}", columns, shown)


def _points(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


class _Arguments(Spec):
    """What `run` is given, by type; what a scenario's keys may be is checked with the scenario."""

    scenario: Path
    methods: tuple[str, ...]
    settings: dict[str, Any]
    out: Path | None
    pool: Path
    target: Any = None
    add_sites: tuple[str | Path, ...] = ()
    without: tuple[str | Path, ...] = ()
    jobs: Any = None
    resume: StrictBool = False
    quiet: StrictBool = False
    threads: int | None = Field(None, ge=1)
    log: tuple[Tool, ...] = ()

    def changes(self) -> dict[str, Any]:
        """The part of it that changes the scenario."""
        sites = {"add_sites": tuple(map(str, self.add_sites)), "without": tuple(map(str, self.without))}
        return {"methods": self.methods, "settings": (*self.settings.items(),), "target": self.target, "jobs": self.jobs, **sites}


@extras_named()
@own_settings(gradients=True)
def run(
    scenario: str | Path,
    *,
    seed: int | None = None,
    backend: Literal["local", "simulation", "deployment"] | None = None,
    methods: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    pool: str | Path = "pool",
    **options: Any,
) -> RunResult:
    """Run a scenario from its YAML to its report: the job of `python -m fedmerge.simulate`.

    Parameters
    ----------
    scenario : str or Path
        The scenario's YAML.
    seed : int, optional
        Root of all randomness, in place of the scenario's.
    backend : {"local", "simulation", "deployment"}, optional
        What carries the run, in place of the scenario's. The results are the same bits.
    methods : sequence of str
        Only these of the scenario's methods; empty for all.
    settings : mapping, optional
        Keys of the scenario and their values, as `--set` takes them: ``{"stream.batch_size": 16}``.
    out : str or Path, optional
        The run folder; default ``runs/<scenario>-<seed>``.
    pool : str or Path
        Where experts are kept; those that are there are reused.
    **options
        ``target``, ``add_sites``, ``without``, ``jobs`` (as of the scenario's overrides); ``resume``, ``quiet``, ``threads``, and
        ``log``, a tuple of ``"tensorboard"`` and ``"mlflow"``.

    Returns
    -------
    RunResult
        The run folder and the summary.

    Raises
    ------
    FedmergeError
        For everything that a user can mend; experts that have arrived stay in the pool.

    Examples
    --------
    >>> import fedmerge
    >>> result = fedmerge.run("scenarios/organs.yaml", seed=1, backend="local", methods=["mean", "eam"], quiet=True)
    >>> sorted(row["method"] for row in result.table)
    ['eam', 'mean']
    >>> result.report_path.as_posix()
    'runs/organs-1/report.html'
    """
    named = {"scenario": scenario, "methods": methods, "settings": settings or {}, "out": out, "pool": pool}
    asked = check(_Arguments, {**named, **options}, "fedmerge.run")
    changes = Overrides(seed=seed, backend=backend, **asked.changes())
    experiment = load_experiment(asked.scenario, changes)
    folder = asked.out or experiment.run_dir
    own = RunOptions(folder, asked.pool, asked.resume, asked.quiet, asked.threads, asked.log)
    return RunResult(folder, run_experiment(experiment, own))


def run_experiment(experiment: Experiment, options: RunOptions) -> dict[str, Any]:
    """The whole story; returns the summary. Raises FedmergeError; experts that have arrived are kept in every case."""
    began, started = time.perf_counter(), time.time()
    refuse_late_events(experiment)
    logged = options.log, options.out, experiment.scenario.name
    with RunFolder(options.out, experiment, keep=options.resume) as folder, run_log(*logged) as log:
        scenario, terminal = experiment.scenario, Terminal(options.quiet, status=folder.status)
        _introduce(experiment, terminal, log)
        refuse_what_has_no_place(experiment)
        generalist, backend = read_generalist(experiment), backend_of(experiment.scenario)
        initial, tasks, outcomes = hospitals(experiment, options, folder, terminal, backend)
        experts = load_experts(tasks, options)
        log.hospitals({expert.site: expert.runs for expert in experts})
        folder.manifest["initial_sha256"] = initial.sha256
        federated = rounds(experiment, tasks, initial, options, folder, terminal, backend)
        down = sum(tensor.numel() * tensor.element_size() for tensor in initial.weights.values())
        folder.manifest["one_shot"] = {"steps": own_steps(experiment, experts), "down": down}
        named = next((one.stand.theta for one in federated if one.strategy.key == str(scenario.generalist)), generalist)
        if scenario.privacy:
            folder.manifest["privacy"] = scenario.privacy.report()
        folder.manifest["experts"] = {expert.site: expert.sha256 for expert in experts}
        folder.manifest["uploads"] = {expert.site: "signed" if expert.signed else "unsigned" for expert in experts}
        brought = [site.name for site in experiment.sites if site.expert]
        terminal.experts(folder.manifest["experts"], folder.manifest["trained"], brought)
        with folder.phase("defenses"):
            vetting = vetted(experiment, initial, experts, options, terminal)
        folder.manifest["vetting"] = vetting.as_record()
        with folder.phase("stream"):
            progress, seen = consume(experiment, initial, Sent(vetting.experts, named, federated), options, terminal, log)
        shown = _kept(folder.manifest, experiment, seen, options)
        logs = {site.name: written_since(site.name, started) for site in (*experiment.sites, experiment.target)}
        told = {f"site '{name}' has a remark in its own log": where for name, where in logs.items() if where}
        folder.manifest["remarks"] += list(told)
        with folder.phase("report"):
            record = record_of(experiment, initial, experts, outcomes, progress.ledger, seen, folder)
            record.audit.extend(item.as_line() for item in shown)
            summary = write(options.out, record)
            log.summary(summary)
            progress.close()
    terminal.summary(summary)
    for remark, where in told.items():
        terminal.say(f"{remark}: {where}")
    terminal.say(f"report: {shown_path(options.out / 'report.html')} ({time.perf_counter() - began:.0f} s)")
    return summary


def _kept(manifest: dict[str, Any], experiment: Experiment, seen: Seen, options: RunOptions) -> list[Item]:
    """What is known after the stream, into the manifest; what the target showed of its images, as the audit has it."""
    shown = _audited(experiment, seen, options)
    each = {site.name: site.source.decided(site.name) for site in (*experiment.sites, experiment.target)}
    manifest |= {
        "course": [asdict(roster) for roster in seen.course],
        "target_deaths": [f"after batch {t}" for t in seen.deaths],
        "index_sha256": seen.description.stream.index_sha256,
        "device": seen.description.device,
        "per_sample": seen.per_sample,
        "bank": seen.description.bank,
        "shown": {"samples": experiment.target.samples, "disagreements": shown[0].shape[0] if shown else 0},
        "images": {name: found for name, found in each.items() if found},
    }
    return shown


def _audited(experiment: Experiment, seen: Seen, options: RunOptions) -> list[Item]:
    """What the target showed of its images, in the audit like all that hospitals show."""
    if seen.disputed is None:
        return []
    target, geometry = experiment.target, experiment.scenario.model.geometry
    shape, places = (geometry.size, geometry.size, geometry.channels), seen.disputed.places
    item = audit_shown(target.name, torch.from_numpy(seen.disputed.images), places, target.disagreements, shape)
    write_audit(options.out / "audit.jsonl", [item])
    return [item]


def _introduce(experiment: Experiment, terminal: Terminal, log: RunLog) -> None:
    """What the run is, and who in it attacks on purpose."""
    scenario = experiment.scenario
    log.words(question=scenario.question, target=experiment.target.name, seed=str(scenario.seed))
    terminal.say(f"{scenario.name}: {len(experiment.sites)} sites, target '{experiment.target.name}', seed {scenario.seed}")
    for site in experiment.sites:
        if site.attack:
            terminal.say(f"SIMULATED ATTACKER: site '{site.name}' attacks on purpose: {site.attack.words}")


def record_of(
    experiment: Experiment,
    initial: Initial,
    experts: list[Expert],
    outcomes: dict[str, Outcome],
    steps: Ledger,
    seen: Seen,
    folder: RunFolder,
) -> RunRecord:
    """All that the report may show."""
    description = seen.description
    sites, done = {site.name: site for site in experiment.sites}, set(steps.methods)
    return RunRecord(
        scenario=experiment.scenario.name,
        question=experiment.scenario.question,
        seed=experiment.scenario.seed,
        classes=experiment.target_classes,
        sites=[_site_row(expert, sites[expert.site], outcomes[expert.site].trained, folder.manifest) for expert in experts],
        target=experiment.target.name,
        target_title=experiment.target.title,
        target_samples=description.shown,
        initialization=initial.description,
        stream=description.stream,
        labels=seen.answers.labels,
        domains=seen.answers.domains,
        patients=seen.answers.patients,
        disputed=seen.disputed,
        steps=steps,
        methods={name: info for name, info in description.rows.items() if name in done},
        forwards_run=seen.forwards_run / description.stream.batches,
        audit=[item for expert in experts for item in expert.audit],
        manifest=folder.manifest,
        yaml=(folder.path / "scenario.yaml").read_text(encoding="utf-8"),
        seconds=folder.manifest["phases_seconds"],
        course=tuple(seen.course),
        novel=tuple(name for name in experiment.target_classes if name not in experiment.classes),
        tasks=_tasks(experiment),
        trained_domains=tuple(sorted({name for one in experts for name in sites[one.site].source.domains()})),
    )


def _tasks(experiment: Experiment) -> dict[str, tuple[str, ...]]:
    """The target's classes by the hospitals that train on them, where there are two tasks or more; some have one together."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, classes in experiment.tasks.items():
        if there := tuple(one for one in experiment.target_classes if one in classes):
            found.setdefault(there, []).append(name)
    return {", ".join(names): classes for classes, names in found.items()} if len(found) > 1 else {}


def _site_row(expert: Expert, site: Site, trained: bool, manifest: dict[str, Any]) -> SiteRow:
    return SiteRow(
        name=expert.site,
        title=site.title,
        trained=trained,
        expert_sha256=expert.sha256,
        n=expert.n,
        validation_accuracy=expert.validation_accuracy,
        temperature=expert.temperature,
        runs=expert.runs,
        signed=expert.signed,
        samples=None if expert.samples is None else expert.samples.numpy(),
        attack=site.attack.words if site.attack else "",
        left_out=manifest["vetting"]["left_out"].get(expert.site, ""),
        brought=site.expert is not None,
    )
