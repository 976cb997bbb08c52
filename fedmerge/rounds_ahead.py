"""What rounds a scenario's federated strategies have still to do, and the local steps that they ask of hospitals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmerge.experts.census import Census
from fedmerge.experts.global_pool import GlobalPool
from fedmerge.experts.initialisation import Initial
from fedmerge.experts.strategy import Strategy
from fedmerge.experts.taking_part import Share
from fedmerge.experts.train import Training
from fedmerge.federate import site_task
from fedmerge.plan import Plan


@dataclass(frozen=True)
class Ahead:
    """One strategy. done: rounds in the pool; None while theta_0, on which that depends, is not there.

    steps: local steps of all rounds, the mean over hospitals. left: those of the rounds that are left, by hospital. Where a
    fraction of the hospitals is drawn, each has its expected share. asked: how often a hospital is asked in the rounds left.
    """

    key: str
    rounds: int
    done: int | None
    steps: float
    left: dict[str, float]
    asked: float

    @property
    def words(self) -> str:
        """How far it is."""
        if self.done is None:
            return "known when theta_0 is there"
        if self.done == self.rounds:
            return "in the pool"
        return f"{self.done} of {self.rounds} rounds in the pool" if self.done else "to train"


def ahead(plan: Plan, pool: Path, initial: Initial | None, sites: Sequence[Census]) -> tuple[Ahead, ...]:
    """All strategies. initial: theta_0, if it is there. sites: what every hospital holds; those that join take no part."""
    founders = [site for site in sites if site.site in plan.founders]
    tasks = [site_task(plan, number, initial) for number in range(len(founders))] if initial else []
    known = GlobalPool(pool, tasks) if tasks else None
    return tuple(
        _ahead(one, known.done(one) if known else None, plan.scenario.training, founders) for one in plan.scenario.federated
    )


def _ahead(strategy: Strategy, done: int | None, training: Training, founders: Sequence[Census]) -> Ahead:
    drawn = strategy.chosen(len(founders)) / len(founders)

    def steps(site: Census, first: int) -> float:
        return drawn * sum(Share.of(strategy, number, training, site.train).steps for number in range(first, strategy.rounds + 1))

    first = (done or 0) + 1
    whole = [steps(site, 1) for site in founders]
    left = {site.site: steps(site, first) for site in founders}
    return Ahead(strategy.key, strategy.rounds, done, sum(whole) / len(whole), left, drawn * (strategy.rounds + 1 - first))
