"""Experts come and go at the target: against federations that always, or never, had them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import TargetTask
from fedmerge.experiment.stream_phase import Walk, at_batch
from fedmerge.merging.methods._base import load_method
from fedmerge.report.batch_log import Step
from fedmerge.report.terminal import Terminal
from fedmerge.stream.events import Event, rosters
from tests.targets import base, experts

Targets = Callable[..., TargetTask]
NORTH, SOUTH, WEST = experts()
BY_NAME = {expert.site: expert for expert in (NORTH, SOUTH, WEST)}
FORGETFUL = (
    "mean",
    "ties",
    "expert",
    "ensemble",
    "dcs",
    "oracle",
    load_method("eam", rho=0),
    load_method("dawin", scope="full", label="full"),
)
REMEMBERING = (
    load_method("eam"),
    load_method("adamerging"),
    load_method("dawin", scope="prefix"),
    load_method("fisher", mode="target", samples=20),
)


def walked(target: Any, founders: tuple[str, ...], *events: Event) -> list[Step]:
    """All steps of a stream with these events."""
    walk = Walk(target, rosters(founders, events), BY_NAME, Terminal(quiet=True))
    return [step for steps in walk for step in steps]


def same(a: list[Step], b: list[Step]) -> None:
    assert [(s.t, s.method, s.encoder, s.head, s.correct) for s in a] == [(s.t, s.method, s.encoder, s.head, s.correct) for s in b]
    assert all(np.array_equal(x.probabilities, y.probabilities) for x, y in zip(a, b, strict=True))


def exact(task: TargetTask) -> TargetTask:
    """The same, with one way for rows of coefficients: which one a batch takes hangs on how many rows there are."""
    return replace(task, per_sample="rows")


def site(task: TargetTask, *names: str) -> TargetSite:
    return TargetSite(exact(task), [BY_NAME[name] for name in names], base())


def test_who_joins_before_the_first_batch_has_always_been_there(target: Targets) -> None:
    task = target(*FORGETFUL, *REMEMBERING, images=72)
    early = site(task, "north", "south")
    early.change(("north", "south", "west"), [WEST])
    whole = site(task, "north", "south", "west").advance(1000)
    same(early.advance(1000), whole)
    same(walked(site(task, "north", "south", "west"), ("north", "south"), Event(at=0, join="west")), whole)


def test_without_a_memory_every_stretch_is_that_of_its_own_federation(target: Targets) -> None:
    """A joins and leaves again: before, between and after, results are those of who always or never had it, bit for bit."""
    task = target(*FORGETFUL)
    changed = walked(site(task, "north", "south"), ("north", "south"), Event(at=3, join="west"), Event(at=7, leave="west"))
    never, always = site(task, "north", "south").advance(1000), site(task, "north", "south", "west").advance(1000)
    wanted = [s for s in never if s.t < 3] + [s for s in always if 3 <= s.t < 7] + [s for s in never if s.t >= 7]
    same(changed, wanted)
    assert [s.t for s in changed if s.method == "expert:west"] == [3, 4, 5, 6]


def test_a_join_and_a_leave_with_no_batch_between_leave_no_trace(target: Targets) -> None:
    task = target("mean", "eam", load_method("adamerging"))
    there = site(task, "north", "south")
    begun = there.advance(4)
    there.change(("north", "south", "west"), [WEST])
    there.change(("north", "south"), [])
    same(begun + there.advance(1000), site(task, "north", "south").advance(1000))


def test_a_snapshot_between_changes_goes_on_as_if_nothing_had_happened(target: Targets) -> None:
    task, events = target(*FORGETFUL, *REMEMBERING, images=72), (Event(at=3, join="west"), Event(at=7, leave="north"))
    whole = walked(site(task, "north", "south"), ("north", "south"), *events)
    course = rosters(("north", "south"), events)
    first = Walk(site(task, "north", "south"), course, BY_NAME, Terminal(quiet=True))
    for steps in first:
        done, snapshot = steps[-1].t + 1, first.target.snapshot()  # type: ignore[attr-defined]
        second = site(task, *at_batch(course, done - 1).experts)
        second.restore(snapshot)
        rest = Walk(second, course, BY_NAME, Terminal(quiet=True))
        rest.there, rest.done = second.bank.names, done
        same([step for some in rest for step in some], [step for step in whole if step.t >= done])
    with pytest.raises(ValueError, match="does not fit"):
        site(task, "north").restore(snapshot)


def test_rows_of_the_table_are_known_from_the_beginning(target: Targets) -> None:
    task = target("mean", "expert", load_method("expert", site="west", label="guest"))
    task = replace(task, experts=("north", "south", "west"))
    there = site(task, "north", "south")
    assert list(there.describe().rows) == ["mean", "expert:north", "expert:south", "expert:west", "guest"]
    assert {step.method for step in there.advance(1)} == {"mean", "expert:north", "expert:south"}
