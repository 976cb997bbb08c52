"""Barriers against closed forms, and paths against models merged by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.geometry.barrier import barrier, between, line
from tests.conftest import Net, expert_states

NUMBERS = st.floats(-5, 5, allow_nan=False)


def test_a_parabola_by_hand() -> None:
    """L(a) = 1 + 2 a + 3 a (1 - a) lies 3 a (1 - a) above its chord: 3/4 at the middle."""
    a = line()
    assert len(a) == 21
    losses = 1 + 2 * a + 3 * a * (1 - a)
    assert float(barrier(losses)) == pytest.approx(0.75, abs=1e-12)
    assert float(barrier(losses, "mean")) == pytest.approx(float(losses.max()) - 2, abs=1e-12)
    valley = 1 + 2 * a - 3 * a * (1 - a)
    assert float(barrier(valley)) == pytest.approx(0, abs=1e-12)
    both = barrier(torch.stack([losses, valley]))
    assert both.tolist() == pytest.approx([0.75, 0])


@given(st.lists(NUMBERS, min_size=2, max_size=30), NUMBERS, NUMBERS)
def test_a_slope_on_top_changes_no_barrier(losses: list[float], height: float, slope: float) -> None:
    x = torch.tensor(losses, dtype=torch.float64)
    lifted = x + height + slope * line(len(x))
    assert float(barrier(lifted)) == pytest.approx(float(barrier(x)), abs=1e-9)
    assert float(barrier(x)) >= 0
    assert float(barrier(x.flip(0))) == pytest.approx(float(barrier(x)), abs=1e-9)


@pytest.mark.parametrize("part", ["both", "encoder", "head"])
def test_a_path_moves_what_it_says(part: str) -> None:
    states = expert_states(3)
    bank = Bank.of(Net(), states, dtype=torch.float64)
    merged = [bank.mix(encoder, head, out=torch.empty_like(bank.rows[0])) for encoder, head in between(bank, 2, 0, part, 5)]  # type: ignore[arg-type]
    first, last = bank.theta[0], bank.theta[2]
    for a, theta in zip(line(5), merged, strict=True):
        moving, halfway = a * last + (1 - a) * first, (first + last) / 2
        encoder = halfway if part == "head" else moving
        head = halfway if part == "encoder" else moving
        torch.testing.assert_close(theta[bank.encoder], encoder[bank.encoder], atol=1e-12, rtol=0)
        torch.testing.assert_close(theta[bank.head], head[bank.head], atol=1e-12, rtol=0)
