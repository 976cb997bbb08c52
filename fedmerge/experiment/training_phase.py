"""The part of a run that concerns hospitals: theta_0 to all of them, and their experts and statistics into the pool."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial

from fedmerge.errors import SiteError, first_of
from fedmerge.experiment.experiment import Experiment, RunOptions
from fedmerge.experiment.scenario import Scenario
from fedmerge.federated.client.site_log import where
from fedmerge.federated.client.site_training import steps_of
from fedmerge.federated.defenses._base import FEWEST
from fedmerge.federated.messages import START_GRACE_S, Backend, Initial, Job, Outcome, SiteTask
from fedmerge.federated.model import build
from fedmerge.federated.pool.experts import Expert, ExpertPool
from fedmerge.federated.pool.global_models import GlobalModel, GlobalPool
from fedmerge.federated.pool.locks import Awaited, turns
from fedmerge.federated.pool.statistics import StatisticPool
from fedmerge.federated.security.audit import write_audit
from fedmerge.federated.server.collect import incomplete
from fedmerge.federated.server.in_process import LocalBackend
from fedmerge.federated.server.initialization import Proxy, initialize, keep_theta_0, kept_proxy
from fedmerge.federated.server.screening import Vetting, probe_of, vet
from fedmerge.report.terminal import MOST_LISTED, Terminal
from fedmerge.system.files import see_that_writable
from fedmerge.system.process import cores

MANY = 20
"""Experts whose checks take so long that progress is shown."""


def backend_of(scenario: Scenario) -> Backend:
    """What carries messages to the hospitals of a scenario. Flower is imported only where it is used."""
    match scenario.backend:
        case "local":
            return LocalBackend(scenario.jobs or cores())
        case "simulation":
            from fedmerge.federated.flower.launcher import SimulationBackend

            return SimulationBackend()
        case "deployment":
            from fedmerge.federated.flower.processes import ProcessesBackend

            return ProcessesBackend()


def make_theta_0(experiment: Experiment, options: RunOptions, terminal: Terminal, backend: Backend | None = None) -> Initial:
    """theta_0, with a head from federated linear probing if the scenario asks for one."""
    scenario, start = experiment.scenario, experiment.scenario.initialization
    kept = not isinstance(start, Proxy) or kept_proxy(start, scenario.model, scenario.seed, options.pool).exists()
    if isinstance(backend, LocalBackend) and not kept:  # no expert can be in the pool
        backend.import_ahead()
    with terminal.progress("initialization: theta_0, which all sites share") as bars:
        initial = initialize(
            scenario.initialization,
            scenario.model,
            len(experiment.classes),
            scenario.seed,
            options.pool,
            lambda done, total, text: bars.tick("server", done, total, text),
            experiment.classes,
            experiment.target_classes,
        )
        if initial.head_init == "fed_lp":
            tasks = tuple(site_task(experiment, n, initial) for n in range(len(experiment.founders)))
            backend = backend or backend_of(scenario)
            initial = backend.probe(
                job_of(experiment, tasks, initial, options), lambda t: bars.tick(t.site, t.done, t.total, t.text)
            )
    if initial.known:
        keep_theta_0(initial, options.pool)
    return initial


def train_sites(
    experiment: Experiment,
    tasks: list[SiteTask],
    initial: Initial,
    options: RunOptions,
    terminal: Terminal,
    backend: Backend,
) -> dict[str, Outcome]:
    """Experts of all sites into the pool. Raises SiteError that names every site without one; the others' are kept.

    Where `min_sites` of them are enough, those without one are reported, and the run goes on with the others. An expert that
    another run is having trained in the same pool is waited for.
    """
    pool, deadline_s = ExpertPool(options.pool), experiment.scenario.training.deadline_s + START_GRACE_S
    awaited = [Awaited(task.site.name, pool.entry(task), partial(pool.has, task)) for task in tasks]
    say = terminal.say
    with turns(pool.path, awaited, deadline_s, lambda site: say(f"hospitals: {site} trains for another run; waiting for it")):
        return _gather(experiment, job_of(experiment, tuple(tasks), initial, options), terminal, backend)


def _gather(experiment: Experiment, job: Job, terminal: Terminal, backend: Backend) -> dict[str, Outcome]:
    pool = ExpertPool(job.pool)
    untrained = [task.site.name for task in job.tasks if not pool.has(task) and task.runs]
    bring = [task.site.name for task in job.tasks if not pool.has(task) and not task.runs]
    asked = [task.site.name for task in incomplete(job)]
    title = "hospitals: every expert is in the pool; nobody trains"
    if asked:
        see_that_writable(job.pool, "--pool")
        kinds = ", ".join(statistic.kind() for statistic in experiment.scenario.uploads)
        title = (
            f"hospitals: {first_of(untrained, MOST_LISTED)} train"
            if untrained
            else f"hospitals: {first_of(asked, MOST_LISTED)} compute {kinds}"
        )
        if bring:
            title = f"{title}; " if untrained else "hospitals: "
            title += f"{first_of(bring, MOST_LISTED)} bring their experts"
    began = time.time()
    with terminal.progress(title, len(asked)) as bars:
        outcomes = backend.gather(job, lambda t: bars.tick(t.site, t.done, t.total, t.text))
    failed = [f"site '{name}': {outcome.reason}{where(name, began)}" for name, outcome in outcomes.items() if outcome.reason]
    there = len(outcomes) - len(failed)
    if failed and there >= (experiment.scenario.min_sites or len(outcomes)):
        for line in failed:
            terminal.say(f"  {line}; the run goes on without it")
    elif failed:
        kept = f"{there} of {len(outcomes)} experts are in the pool, and will not be trained again"
        raise SiteError("\n".join([*failed, kept]))
    return outcomes


def run_strategies(
    experiment: Experiment,
    tasks: list[SiteTask],
    initial: Initial,
    options: RunOptions,
    terminal: Terminal,
    backend: Backend,
) -> tuple[GlobalModel, ...]:
    """The global models of all federated strategies, from the hospitals that are there from the beginning.

    Raises SiteError with every strategy that came to no end; the rounds that were done are kept. A model that another run is
    having made in the same pool is waited for.
    """
    founders = [task for task in tasks if task.site.name in experiment.founders]
    if not experiment.scenario.federated:
        return ()
    if not founders:
        keys = ", ".join(strategy.key for strategy in experiment.scenario.federated)
        found = "found no expert of a hospital that is there from the beginning, and others come too late for the rounds"
        raise SiteError(
            f"federated: {keys}: {found}; expected one or more. Experts are in the pool; leave 'federated' out to use them"
        )
    pool, strategies = GlobalPool(options.pool, founders), experiment.scenario.federated
    awaited = [Awaited(one.key, pool.entry(one), partial(pool.has, one)) for one in strategies]
    deadline_s = sum(one.rounds for one in strategies) * experiment.scenario.training.deadline_s + START_GRACE_S
    with turns(options.pool, awaited, deadline_s, lambda key: terminal.say(f"federated: {key} in another run; waiting for it")):
        missing = [one.key for one in strategies if not pool.has(one)]
        if missing:
            see_that_writable(options.pool, "--pool")
        title = f"federated: {', '.join(missing)} in rounds" if missing else "federated: every model is in the pool"
        with terminal.progress(title) as bars:
            job = job_of(experiment, tuple(founders), initial, options)
            failed = backend.compete(job, lambda tick: bars.tick(tick.site, tick.done, tick.total, tick.text))
    if failed:
        said = "; ".join(f"{key}: {reason}" for key, reason in failed.items())
        raise SiteError(f"federated: {said}. Finished rounds are in the pool; --resume goes on after them")
    models = tuple(pool.model(strategy) for strategy in strategies)
    for model in models:
        for one in model.stand.absences if model.strategy.key in missing else ():
            terminal.say(f"  {model.strategy.key}, round {one.round}, goes on without site '{one.site}': {one.reason}")
    return models


def own_steps(experiment: Experiment, experts: list[Expert]) -> dict[str, int]:
    """Local steps of every site's own training, all runs together; of those that tell how many images they have."""
    training, bring = experiment.scenario.training, {site.name for site in experiment.sites if site.expert}
    steps = {one.site: training.runs * steps_of(training, one.n)[1] for one in experts if one.n is not None}
    return {site: 0 if site in bring else count for site, count in steps.items()}


def load_experts(tasks: list[SiteTask], options: RunOptions) -> list[Expert]:
    """Every site's expert, with the statistics that came with it."""
    pool = ExpertPool(options.pool)
    known = StatisticPool(pool, tasks)
    return [known.with_statistics(pool.load(task), task) for task in tasks]


def vetted(experiment: Experiment, initial: Initial, experts: list[Expert], options: RunOptions, terminal: Terminal) -> Vetting:
    """The scenario's defenses at the server; what they do goes into the audit. Raises DataError for public images."""
    scenario = experiment.scenario
    needed = len(experts) >= FEWEST and any(defense.probe for defense in scenario.defenses)
    probe = probe_of(scenario.initialization, scenario.probe, scenario.model, experiment.classes, scenario.seed) if needed else None
    model = build(scenario.model, len(experiment.classes), seed=scenario.seed)
    looks = nullcontext() if len(experts) < MANY else terminal.progress(f"defenses: {len(experts)} experts on public images")
    with looks as bars:
        tick = (lambda done, total: bars.tick("server", done, total, "looks at experts")) if bars else lambda done, total: None
        found = vet(experts, initial.weights if initial.known else None, model, scenario.defenses, probe, tick)
    write_audit(options.out / "audit.jsonl", found.audit())
    for one in found.done:
        terminal.say(f"DEFENSE {one.check}: the expert of '{one.site}' is {one.what}: {one.why}")
    for remark in found.remarks:
        terminal.say(f"defenses {remark}" if "," in remark.partition(":")[0] else f"defense {remark}")
    return found


def site_task(experiment: Experiment, number: int, initial: Initial) -> SiteTask:
    """What one site is asked."""
    scenario, site = experiment.scenario, experiment.sites[number]
    if site.expert:
        site = site.model_copy(update={"expert": site.expert.found_anywhere()})
    return SiteTask(
        site=site,
        model=scenario.model.as_sent,
        training=scenario.training,
        classes=experiment.classes,
        seed=scenario.seed,
        initial_sha256=initial.sha256,
        head_init=initial.head_init,
        own=experiment.tasks.get(site.name, ()),
        uploads=scenario.uploads,
        federated=scenario.federated,
        privacy=scenario.privacy,
    )


def job_of(experiment: Experiment, tasks: tuple[SiteTask, ...], initial: Initial, options: RunOptions) -> Job:
    """What is gathered from the sites, and where it goes."""
    scenario = experiment.scenario
    audit, deadline_s = options.out / "audit.jsonl", scenario.training.deadline_s
    return Job(tasks, initial, options.pool, audit, deadline_s, scenario.min_sites, scenario.limits)
