"""The part of a run that concerns hospitals: theta_0 to all of them, and their experts and statistics into the pool."""

from __future__ import annotations

from fedmerge.errors import SiteError
from fedmerge.experts.asking import START_GRACE_S, Job, Outcome
from fedmerge.experts.gather import incomplete
from fedmerge.experts.initialisation import Initial, initialise, keep
from fedmerge.experts.pool import Expert, ExpertPool
from fedmerge.experts.statistic_pool import StatisticPool
from fedmerge.experts.train import SiteTask
from fedmerge.experts.turns import turns
from fedmerge.plan import Plan
from fedmerge.report.terminal import Terminal
from fedmerge.run_folder import Request


def start(plan: Plan, request: Request, terminal: Terminal) -> Initial:
    """theta_0, with a head from federated linear probing if the scenario asks for one."""
    scenario = plan.scenario
    with terminal.progress("initialisation: theta_0, which all sites share") as bars:
        initial = initialise(
            scenario.initialisation,
            scenario.model,
            len(plan.classes),
            scenario.seed,
            request.pool,
            lambda done, total, text: bars.tick("coordinator", done, total, text),
        )
        if initial.head_init == "fed_lp":
            from fedmerge.experts.federation import probe

            tasks = tuple(site_task(plan, number, initial) for number in range(len(plan.sites)))
            initial = probe(job_of(plan, tasks, initial, request), lambda t: bars.tick(t.site, t.done, t.total, t.text))
    keep(initial, request.pool)
    return initial


def gather(plan: Plan, tasks: list[SiteTask], initial: Initial, request: Request, terminal: Terminal) -> dict[str, Outcome]:
    """Experts of all sites into the pool. Raises SiteError that names every site without one; the others' are kept.

    An expert that another run is having trained in the same pool is waited for.
    """
    pool, deadline_s = ExpertPool(request.pool), plan.scenario.training.deadline_s + START_GRACE_S
    with turns(pool, tasks, deadline_s, lambda site: terminal.say(f"hospitals: {site} trains for another run; waiting for it")):
        return _gather(plan, tasks, initial, request, terminal)


def _gather(plan: Plan, tasks: list[SiteTask], initial: Initial, request: Request, terminal: Terminal) -> dict[str, Outcome]:
    from fedmerge.experts.federation import gather as ask

    pool = ExpertPool(request.pool)
    job = job_of(plan, tuple(tasks), initial, request)
    untrained = [task.site.name for task in tasks if not pool.has(task)]
    asked = [task.site.name for task in incomplete(job)]
    title = "hospitals: every expert is in the pool; nobody trains"
    if asked:
        kinds = ", ".join(statistic.kind() for statistic in plan.scenario.uploads)
        title = f"hospitals: {', '.join(untrained)} train" if untrained else f"hospitals: {', '.join(asked)} compute {kinds}"
    with terminal.progress(title) as bars:
        outcomes = ask(job, lambda t: bars.tick(t.site, t.done, t.total, t.text))
    failed = [f"site '{outcome.site}': {outcome.reason}" for outcome in outcomes.values() if outcome.reason]
    if failed:
        kept = f"{len(outcomes) - len(failed)} of {len(outcomes)} experts are in the pool, and are not trained again"
        raise SiteError("\n".join([*failed, kept]))
    return outcomes


def load_experts(tasks: list[SiteTask], request: Request) -> list[Expert]:
    """Every site's expert, with the statistics that came with it."""
    pool = ExpertPool(request.pool)
    known = StatisticPool(pool, tasks)
    return [known.with_statistics(pool.load(task), task) for task in tasks]


def site_task(plan: Plan, number: int, initial: Initial) -> SiteTask:
    """What one site is asked."""
    scenario = plan.scenario
    return SiteTask(
        site=plan.sites[number],
        model=scenario.model,
        training=scenario.training,
        classes=plan.classes,
        seed=scenario.seed,
        initial_sha256=initial.sha256,
        head_init=initial.head_init,
        uploads=scenario.uploads,
    )


def job_of(plan: Plan, tasks: tuple[SiteTask, ...], initial: Initial, request: Request) -> Job:
    """What is gathered from the sites, and where it goes."""
    return Job(tasks, initial, request.pool, request.out / "audit.jsonl", plan.scenario.training.deadline_s)
