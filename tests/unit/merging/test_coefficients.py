"""A cap keeps coefficients on the simplex, bounds every expert, and does nothing where nobody is above it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.merging.coefficients import Coefficients, cap, capped

rows = st.lists(st.floats(0, 1), min_size=1, max_size=7).filter(lambda row: sum(row) > 1e-6)


def simplex(row: list[float]) -> torch.Tensor:
    alpha = torch.tensor(row, dtype=torch.float64)
    return alpha / alpha.sum()


@settings(max_examples=200, deadline=None)
@given(rows, st.floats(0.01, 1))
def test_a_cap_keeps_the_simplex_and_the_order(row: list[float], most: float) -> None:
    alpha = simplex(row)
    found = capped(alpha, most)
    bound = max(most, 1 / len(row))
    torch.testing.assert_close(found.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert float(found.min()) >= 0
    assert float(found.max()) <= bound * (1 + 1e-5)
    above = found[:, None] - found[None, :]
    assert bool((above[alpha[:, None] > alpha[None, :]] >= -1e-5).all())  # who counted more still does not count less
    torch.testing.assert_close(capped(found, most), found)


@settings(max_examples=100, deadline=None)
@given(rows)
def test_a_cap_that_nobody_exceeds_changes_no_bit(row: list[float]) -> None:
    alpha = simplex(row)
    assert torch.equal(capped(alpha, float(alpha.max())), alpha)
    assert torch.equal(capped(alpha, 1.0), alpha)


def test_by_hand() -> None:
    torch.testing.assert_close(capped(torch.tensor([0.8, 0.15, 0.05]), 0.6), torch.tensor([0.6, 0.3, 0.1]))
    torch.testing.assert_close(capped(torch.tensor([1.0, 0.0, 0.0]), 0.6), torch.tensor([0.6, 0.2, 0.2]))
    torch.testing.assert_close(capped(torch.tensor([0.7, 0.29, 0.01]), 0.4), torch.tensor([0.4, 0.4, 0.2]))  # two fill up
    torch.testing.assert_close(capped(torch.tensor([0.9, 0.1]), 0.2), torch.tensor([0.5, 0.5]))  # 0.2 of two experts is 1/2


def test_rows_by_themselves_and_anchors_as_they_are() -> None:
    given = torch.tensor([[0.8, 0.1, 0.1], [0.4, 0.0, 0.6]])  # two experts, and theta_0
    found = cap(Coefficients(given, given[0]), 2, 0.6)
    torch.testing.assert_close(found.encoder, torch.tensor([[0.54, 0.36, 0.1], [0.24, 0.16, 0.6]]))
    torch.testing.assert_close(found.head, torch.tensor([0.54, 0.36, 0.1]))
    assert cap(Coefficients(given, given[0]), 2, None).encoder is given
