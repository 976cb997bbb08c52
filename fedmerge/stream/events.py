"""Hospitals that come and go while the stream runs: what a scenario may say of it, and who is there at which batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from fedmerge.errors import Problem, nearest
from fedmerge.merging.state import Roster
from fedmerge.registry import Spec


class Event(Spec):
    """One change among the experts, between two batches: a hospital joins, leaves, or has its expert replaced.

    Examples
    --------
    >>> from fedmerge.stream.events import Event
    >>> Event(at=8, join="sites/st_anna.yaml").words
    'st_anna joins'
    >>> Event(at=12, replace="axial", by="coronal").words
    'axial is replaced by coronal'
    """

    at: int = Field(ge=0, description="number of the batch before which it happens, from 0")
    join: str | None = Field(None, description="a hospital that arrives with its expert: name of a file in sites/, or a path")
    leave: str | None = Field(None, description="a hospital that leaves and takes its expert with it")
    replace: str | None = Field(None, description="a hospital whose expert is replaced")
    by: str | None = Field(
        None, description="with replace: the hospital whose expert comes instead, e.g. the same hospital with new training"
    )

    @model_validator(mode="after")
    def _one_thing(self) -> Self:
        if sum(name is not None for name in (self.join, self.leave, self.replace)) != 1:
            raise ValueError("an event is one of join, leave, and replace")
        if (self.replace is None) != (self.by is None):
            raise ValueError("replace: and by: belong together")
        return self

    @property
    def arrives(self) -> str | None:
        """Name of the hospital that comes, if one does."""
        given = self.join or self.by
        return Path(given).stem if given else None

    @property
    def departs(self) -> str | None:
        """Name of the hospital that goes, if one does."""
        given = self.leave or self.replace
        return Path(given).stem if given else None

    @property
    def words(self) -> str:
        """What happens, for the report."""
        if self.arrives and self.departs:
            return f"{self.departs} is replaced by {self.arrives}"
        return f"{self.arrives} joins" if self.arrives else f"{self.departs} leaves"


def rosters(founders: Sequence[str], events: Sequence[Event], missing: Collection[str] = ()) -> list[Roster]:
    """Every set of experts with its first batch; the first from batch 0.

    The order of experts is that of founders and then of first arrival, whoever came when: sums of floats depend on it.

    Parameters
    ----------
    founders : Sequence[str]
        Hospitals at the start.
    events : Sequence[Event]
        Who comes and goes.
    missing : Collection[str], default ()
        Hospitals without an expert; what an event says of them does not happen: whom one of them was to replace stays, and who
        was to replace one of them joins.

    Returns
    -------
    list[Roster]
        In the order of their first batches.

    Examples
    --------
    >>> from fedmerge.stream.events import Event, rosters
    >>> for roster in rosters(["axial", "coronal"], [Event(at=8, leave="axial"), Event(at=8, join="st_anna")]):
    ...     print(roster.start, roster.experts)
    0 ('axial', 'coronal')
    8 ('coronal', 'st_anna')
    """
    order = list(dict.fromkeys([*founders, *(event.arrives for event in _sorted(events) if event.arrives)]))
    there: set[str | None] = {name for name in founders if name not in missing}
    found = [Roster(0, tuple(name for name in order if name in there))]
    for at, moment in groupby(_sorted(events), key=lambda event: event.at):
        said = []
        for event in moment:
            departs = event.departs if event.departs in there else None
            if event.arrives in missing or not (departs or event.arrives):
                continue
            there = (there - {departs}) | ({event.arrives} if event.arrives else set())
            said.append(event.words if departs == event.departs else f"{event.arrives} joins")
        experts = tuple(name for name in order if name in there)
        if experts != found[-1].experts:
            found[-1:] = [Roster(at, experts, "; ".join(said))] if at == 0 else [found[-1], Roster(at, experts, "; ".join(said))]
    return found


def inconsistent(founders: Sequence[str], events: Sequence[Event]) -> list[Problem]:
    """Events that contradict each other: a join of who is there, a departure of who is not, and nobody left.

    Parameters
    ----------
    founders : Sequence[str]
        Hospitals at the start.
    events : Sequence[Event]
        Who comes and goes.

    Returns
    -------
    list[Problem]
        One problem for each.

    Examples
    --------
    >>> from fedmerge.stream.events import Event, inconsistent
    >>> [problem.found for problem in inconsistent(["axial", "coronal"], [Event(at=8, join="axial")])]
    ["'axial', who is there already at batch 8"]
    """
    problems: list[Problem] = []
    there, numbers = list(founders), {id(event): number for number, event in enumerate(events)}
    for at, moment in groupby(_sorted(events), key=lambda event: event.at):
        for event in moment:
            key = f"events[{numbers[id(event)]}]"
            problems += _impossible(key, event, there)
            there = [name for name in there if name != event.departs] + ([event.arrives] if event.arrives else [])
        if not there:
            mend = "Let another hospital join first, or end the stream before with stream.max_batches"
            problems.append(Problem("", key, f"the last hospital leaving at batch {at}", "at least one expert", mend))
            there = list(founders)
    return problems


def past_end(events: Sequence[Event], batches: int, where: str) -> list[Problem]:
    """Events that would come after the stream is over.

    Parameters
    ----------
    events : Sequence[Event]
        Who comes and goes.
    batches : int
        Of the stream.
    where : str
        The file that lists the events.

    Returns
    -------
    list[Problem]
        One problem for each.

    Examples
    --------
    >>> from fedmerge.stream.events import Event, past_end
    >>> [str(problem) for problem in past_end([Event(at=40, leave="axial")], batches=24, where="organs.yaml")]
    ['organs.yaml: events[0].at: found 40; expected at most 23: the stream has 24 batches, from 0']
    """
    return [
        Problem(where, f"events[{number}].at", str(event.at), f"at most {batches - 1}: the stream has {batches} batches, from 0")
        for number, event in enumerate(events)
        if event.at >= batches
    ]


def _impossible(key: str, event: Event, there: Sequence[str]) -> Iterator[Problem]:
    if event.departs and event.departs not in there:
        found = f"'{event.departs}', who is not there at batch {event.at}"
        part = "leave" if event.leave else "replace"
        yield Problem("", f"{key}.{part}", found, "a hospital that is there then", nearest(event.departs, there))
    if event.arrives and event.arrives in there:
        found = f"'{event.arrives}', who is there already at batch {event.at}"
        yield Problem("", f"{key}.{'join' if event.join else 'by'}", found, "a hospital that is not there then")


def _sorted(events: Sequence[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event.at)
