"""The course of the stream: who is there from which batch on, and the walk through it, from change to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from fedmerge.adaptation.horizon import count_batches
from fedmerge.adaptation.task import Contribution
from fedmerge.errors import ScenarioError, SiteError
from fedmerge.plan import Plan
from fedmerge.report.step import Step
from fedmerge.report.terminal import Terminal
from fedmerge.stream.events import Roster, past_end, rosters

BATCHES_AT_A_TIME = 4
"""Batches between two signs of life from the target, and between two snapshots; fewer before a change."""


class Target(Protocol):
    """What the walk needs of a target."""

    def advance(self, batches: int) -> list[Step]: ...

    def change(self, names: Sequence[str], arriving: Sequence[Contribution] = ()) -> None: ...


def refuse_late_events(plan: Plan) -> None:
    """Raises ScenarioError if an event comes after the end of the stream, before anybody trains for it."""
    scenario = plan.scenario
    if scenario.events:
        batches = count_batches(plan.target, scenario.model.geometry, scenario.stream, scenario.seed)
        if problems := past_end(scenario.events, batches, f"scenario '{scenario.name}'"):
            raise ScenarioError(problems)


def course_of(plan: Plan, there: Sequence[str]) -> list[Roster]:
    """Every set of experts with its first batch, of those hospitals that have sent one.

    Raises SiteError if at some batch none of them would be there.
    """
    missing = {site.name for site in plan.sites} - set(there)
    course = rosters(plan.founders, plan.scenario.events, missing)
    for roster in course:
        if not roster.experts:
            raise SiteError(f"without {', '.join(sorted(missing))} no expert would be there at batch {roster.start}")
    return course


def at_batch(course: Sequence[Roster], t: int) -> Roster:
    """Who is there at batch t."""
    return next(roster for roster in reversed(course) if roster.start <= t)


class Walk:
    """The way through a stream, from batch `done` on. there: whose experts the target has now."""

    def __init__(self, target: Target, course: Sequence[Roster], experts: Mapping[str, Contribution], terminal: Terminal) -> None:
        self.target, self.course, self.experts, self.terminal = target, course, experts, terminal
        self.there = course[0].experts
        self.done = 0

    def change(self, names: Sequence[str]) -> None:
        """Let the target have the experts of these names, if it has others."""
        if tuple(names) != self.there:
            self.target.change(list(names), [self.experts[name] for name in names if name not in self.there])
            self.there = tuple(names)

    def __iter__(self) -> Iterator[list[Step]]:
        """Steps of some batches at a time, with every change between the batches where it belongs."""
        while True:
            now = at_batch(self.course, self.done)
            if now.experts != self.there:
                self.change(now.experts)
                self.terminal.say(f"  before batch {now.start}: {now.change}")
            left = [roster.start - self.done for roster in self.course if roster.start > self.done]
            steps = self.target.advance(min([BATCHES_AT_A_TIME, *left]))
            if not steps:
                return
            self.done = steps[-1].t + 1
            yield steps
