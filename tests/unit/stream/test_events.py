"""Who is there at which batch, and what cannot happen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedmerge.merging.state import Roster
from fedmerge.stream.events import Event, inconsistent, past_end, rosters

FOUNDERS = ("north", "south")


def event(at: int, **what: str) -> Event:
    return Event.model_validate({"at": at, **what})


def test_a_stream_with_a_join_a_leave_and_a_replacement() -> None:
    events = [event(6, leave="north"), event(3, join="sites/east.yaml"), event(8, replace="south", by="south_renewed")]
    assert inconsistent(FOUNDERS, events) == []
    assert rosters(FOUNDERS, events) == [
        Roster(0, ("north", "south")),
        Roster(3, ("north", "south", "east"), "east joins"),
        Roster(6, ("south", "east"), "north leaves"),
        Roster(8, ("east", "south_renewed"), "south is replaced by south_renewed"),
    ]


def test_an_event_before_the_first_batch_is_the_beginning() -> None:
    assert rosters(FOUNDERS, [event(0, join="east")]) == [Roster(0, ("north", "south", "east"), "east joins")]


def test_who_comes_back_stands_where_it_stood() -> None:
    """Sums of floats depend on the order, and must not depend on who was away."""
    back = rosters(FOUNDERS, [event(2, leave="north"), event(4, join="north")])
    assert [one.experts for one in back] == [("north", "south"), ("south",), ("north", "south")]


def test_what_a_missing_hospital_was_to_do_does_not_happen() -> None:
    events = [event(1, join="east"), event(2, leave="north"), event(3, replace="south", by="west")]
    assert [one.experts for one in rosters(FOUNDERS, events, {"east"})] == [FOUNDERS, ("south",), ("west",)]
    assert [one.experts for one in rosters(FOUNDERS, events, {"west", "east"})] == [FOUNDERS, ("south",)]
    late = rosters(FOUNDERS, events, {"south"})
    assert late[-1] == Roster(3, ("east", "west"), "west joins")
    assert [one.experts for one in rosters(("north",), [event(2, leave="north")], {"north"})] == [()]


@pytest.mark.parametrize(
    ("events", "key", "found"),
    [
        ([event(4, join="north")], "events[0].join", "there already at batch 4"),
        ([event(4, leave="nort")], "events[0].leave", "'nort', who is not there"),
        ([event(4, replace="east", by="west")], "events[0].replace", "who is not there"),
        ([event(4, replace="north", by="south")], "events[0].by", "there already"),
        ([event(4, leave="north"), event(2, leave="north")], "events[0].leave", "who is not there at batch 4"),
        ([event(4, leave="north"), event(5, leave="south")], "events[1]", "the last hospital leaving at batch 5"),
    ],
)
def test_what_cannot_happen_is_named(events: list[Event], key: str, found: str) -> None:
    (problem,) = inconsistent(FOUNDERS, events)
    assert problem.key == key
    assert found in problem.found


def test_all_may_be_exchanged_in_one_moment() -> None:
    swap = [event(4, leave="north"), event(4, leave="south"), event(4, join="east")]
    assert inconsistent(FOUNDERS, swap) == []
    assert rosters(FOUNDERS, swap)[-1] == Roster(4, ("east",), "north leaves; south leaves; east joins")


def test_an_event_past_the_end() -> None:
    assert past_end([event(9, join="east")], 10, "x.yaml") == []
    (problem,) = past_end([event(9, join="east"), event(10, leave="east")], 10, "x.yaml")
    assert "x.yaml: events[1].at: found 10; expected at most 9: the stream has 10 batches" in str(problem)


@pytest.mark.parametrize("given", [{}, {"join": "a", "leave": "b"}, {"replace": "a"}, {"join": "a", "by": "b"}])
def test_an_event_is_one_thing(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Event.model_validate({"at": 1, **given})


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["join", "leave"]), st.sampled_from("abcde")), max_size=8))
def test_rosters_are_what_a_walk_by_hand_gives(moves: list[tuple[int, str, str]]) -> None:
    """Whatever is consistent: a naive walk through the batches has the same experts at every batch."""
    events = [event(at, **{what: who}) for at, what, who in moves]
    if inconsistent(("a", "b"), events):
        return
    found, there = rosters(("a", "b"), events), {"a", "b"}
    for t in range(10):
        for at, what, who in sorted(moves, key=lambda move: move[0]):
            if at == t:
                there = there | {who} if what == "join" else there - {who}
        assert set(next(one for one in reversed(found) if one.start <= t).experts) == there
