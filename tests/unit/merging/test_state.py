"""What methods remember when experts come and go: closed forms, and laws over the whole folder."""

from __future__ import annotations

import pytest
import torch

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Online, State, Stateful, load_method
from fedmerge.merging.state import carried_rows, carried_shares, places
from tests.banks import a_bank, a_batch, an_answer
from tests.conftest import expert_states
from tests.unit.merging.test_laws import CASES, Case

STATES = expert_states(4, 1, spread=1.0)


def bank_of(*which: int) -> Bank:
    return a_bank(STATES, order=list(which))


def evidence(bank: Bank, seed: int) -> Evidence:
    return Evidence(bank, a_batch(seed=seed))


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_shares_go_to_who_stays() -> None:
    past = double(0.5, 0.3, 0.2)
    found = carried_shares(past, "abc", "bcd")
    assert found is not None
    torch.testing.assert_close(found, double(0.6, 0.4, 0))
    joined = carried_shares(past, "abc", "abcd")
    assert joined is not None
    assert joined.tolist() == [0.5, 0.3, 0.2, 0]
    assert carried_shares(past, "abc", "de") is None
    back = carried_shares(joined, "abcd", "abc")
    assert back is not None
    assert torch.equal(back, past)
    assert places("abc", "ca") == [2, 0]
    assert places("abc", "cd") is None
    assert carried_rows(past, "abc", "dcb", double(7, 8, 9)).tolist() == [7, 0.2, 0.3]


def test_a_newcomer_of_the_coefficients_average_rises_from_nothing() -> None:
    """Under constant alpha its n-th batch gives it (1 - rho^n) alpha_k."""
    rho, method = 0.5, load_method("eam", rho=0.5)
    assert isinstance(method, Stateful)
    two, three = bank_of(0, 1), bank_of(0, 1, 2)
    state = method.step(method.start(two), evidence(two, 1))[0]
    state = method.carried(state, two.names, three)
    alpha = method.coefficients(evidence(three, 2))
    for n in range(1, 5):
        state, found = method.step(state, evidence(three, 2))
        for part in ("encoder", "head"):
            now = getattr(found, part)
            torch.testing.assert_close(now[2], (1 - rho**n) * getattr(alpha, part)[2], rtol=1e-12, atol=0)
            torch.testing.assert_close(now.sum(), torch.ones((), dtype=torch.float64))


def test_a_leavers_part_of_the_average_is_divided() -> None:
    method = load_method("eam", rho=0.5)
    assert isinstance(method, Stateful)
    three, two = bank_of(0, 1, 2), bank_of(0, 2)
    state, before = method.step(method.start(three), evidence(three, 1))
    _, found = method.step(method.carried(state, three.names, two), evidence(two, 2))
    alpha = method.coefficients(evidence(two, 2))
    for part in ("encoder", "head"):
        past = getattr(before, part)[[0, 2]]
        torch.testing.assert_close(getattr(found, part), 0.5 * past / past.sum() + 0.5 * getattr(alpha, part))


@pytest.mark.parametrize("ema", ["entropy", "gap_score"])
def test_a_newcomers_entropy_has_no_past_to_be_averaged_with(ema: str) -> None:
    """Its average begins with its first batch; who stays goes on as if nobody had come."""
    method = load_method("eam", rho=0.9, ema=ema)
    assert isinstance(method, Stateful)
    two, three = bank_of(0, 1), bank_of(0, 1, 2)
    state = method.step(method.start(two), evidence(two, 1))[0]
    grown, _ = method.step(method.carried(state, two.names, three), evidence(three, 2))
    alone, _ = method.step(state, evidence(two, 2))
    fresh, _ = method.step(method.start(three), evidence(three, 2))
    for name in ("entropy",) if ema == "entropy" else ("score",):
        torch.testing.assert_close(grown[name][:2], alone[name])
        torch.testing.assert_close(grown[name][2], fresh[name][2])


@pytest.mark.parametrize("given", [{}, {"offset": True}, {"score": "confidence"}])
def test_a_prefix_without_a_leaver_is_that_of_who_never_had_it(given: dict[str, object]) -> None:
    method = load_method("dawin", scope="prefix", **given)
    assert isinstance(method, Stateful)
    three, two = bank_of(0, 1, 3), bank_of(0, 3)
    state, never = method.start(three), method.start(two)
    for seed in (1, 2):
        state, never = method.step(state, evidence(three, seed))[0], method.step(never, evidence(two, seed))[0]
    found = method.step(method.carried(state, three.names, two), evidence(two, 5))[1]
    assert torch.equal(found.encoder, method.step(never, evidence(two, 5))[1].encoder)
    assert method.carried(state, three.names, bank_of(0, 1, 2, 3)) == {}


@pytest.mark.parametrize("level", ["task", "layer"])
def test_a_newcomer_of_adamerging_takes_adams_first_step(level: str) -> None:
    """Adam's first step is of size lr whatever came before, and who stays keeps coefficients and moments."""
    method = load_method("adamerging", level=level, lr=1e-3)
    assert isinstance(method, Online)
    two, three = bank_of(0, 1), bank_of(0, 1, 2)
    state = method.start(two)
    for seed in range(3):
        state = method.step(state, evidence(two, seed))[0]
    grown = method.carried(state, two.names, three)
    assert torch.equal(grown["c"][:2], state["c"])
    assert torch.equal(grown["first"][:2], state["first"])
    assert grown["taken"].tolist() == [3, 3, 0]
    after = method.step(grown, evidence(three, 7))[0]
    steps = (after["c"][2] - 0.3).abs()
    moved = steps[steps > 1e-9]
    assert len(moved) > 0
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-3, atol=0)
    back = method.carried(after, three.names, two)
    assert torch.equal(back["c"], after["c"][:2])


def walk(method: Stateful, moments: list[tuple[int, Bank]], batches: int = 4) -> list[torch.Tensor]:
    """What a method makes of some batches, when from batch t on the experts are those of another bank."""
    banks = dict(moments)
    bank = banks[0]
    state: State = method.start(bank)
    found = []
    for t in range(batches):
        if t in banks and t > 0:
            state, bank = method.carried(state, bank.names, banks[t]), banks[t]
        seen = evidence(bank, t)
        with seen.opened(an_answer(6)):
            state, made = method.step(state, seen)
        found.append(made.encoder if isinstance(made, Coefficients) else made)
    return found


def stateful(case: Case) -> list[Stateful]:
    rows = case.method().expand(bank_of(0, 1, 2).names)
    return [row for row in rows if isinstance(row, Stateful) and not row.transductive]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_remembers_nothing_does_not_mind_who_was_there_before(case: Case) -> None:
    """After a join and a leave everything is as if nobody had come; exactly, where the state is empty."""
    for method in stateful(case):
        two, three = bank_of(0, 1), bank_of(0, 1, 2)
        seen = evidence(two, 0)
        with seen.opened(an_answer(6)):
            remembers = bool(method.step(method.start(two), seen)[0])
        changed, never = walk(method, [(0, two), (1, three), (2, two)]), walk(method, [(0, two)])
        for t in (0, 2, 3):
            if t == 0 or not remembers:
                assert torch.equal(changed[t], never[t])
            assert torch.isfinite(changed[t]).all()
        assert changed[1].isfinite().all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_who_leaves_before_a_batch_comes_costs_nobody_the_past(case: Case) -> None:
    """A leave of somebody who has not yet been asked anything changes no bit of what the others remember.

    Not where a newcomer's arrival alone begins a new prefix: there the past is that of images which all experts have seen.
    """
    for method in stateful(case):
        two, three = bank_of(0, 1), bank_of(0, 1, 2)
        seen = evidence(two, 0)
        with seen.opened(an_answer(6)):
            state = method.step(method.start(two), seen)[0]
        there = method.carried(state, two.names, three)
        back = method.carried(there, three.names, two)
        if there and set(there) == set(state) and not _begins_anew(method):
            assert all(torch.equal(back[name], state[name]) for name in state)


def _begins_anew(method: Stateful) -> bool:
    return method.kind() in ("dawin", "dawin_sample", "fisher")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_change_to_the_same_experts_in_another_order_follows_them(case: Case) -> None:
    for method in stateful(case):
        if "order" in method.exceptions:
            continue
        here, there = bank_of(0, 1, 2), bank_of(2, 0, 1)
        kept, moved = walk(method, [(0, here)]), walk(method, [(0, here), (2, there)])
        for a, b in zip(kept[2:], moved[2:], strict=True):
            if a.shape[-1] in (3, 5):  # coefficients of the experts, anchors behind them; else merged parameters
                experts = a[..., [2, 0, 1]]
                torch.testing.assert_close(b[..., :3], experts, rtol=1e-9, atol=1e-12)
            else:
                torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)
