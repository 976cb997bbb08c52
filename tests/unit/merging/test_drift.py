"""Angles, norms and attenuation against closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmerge.errors import CheckpointError
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.geometry.drift import angles, drift, parameter_blocks
from tests.conftest import Net, expert_states


def bank_of(*rows: list[float], base: list[float] | None = None) -> Bank:
    """Experts whose encoder is one weight matrix (1, n), and whose head is the same numbers."""
    n = len(rows[0])
    model = nn.Sequential(nn.Linear(n, 1, bias=False), nn.Linear(1, n, bias=False)).double()

    def state(row: list[float]) -> dict[str, torch.Tensor]:
        weight = torch.tensor([row], dtype=torch.float64)
        return {"0.weight": weight, "1.weight": weight.T.contiguous()}

    states, start = [state(row) for row in rows], state(base) if base else None
    return Bank.of(model, states, start, head=("1.weight",), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 180), st.floats(0.1, 10), st.floats(0.1, 10))
def test_two_experts_at_an_angle(degrees: float, a: float, b: float) -> None:
    t = math.radians(degrees)
    found = drift(bank_of([a, 0.0], [b * math.cos(t), b * math.sin(t)]), relative=False)
    assert found.blocks == ("0", "head")
    assert found.mean_angle.tolist() == pytest.approx([degrees] * 2, abs=1e-6)
    exact = math.sqrt(max(0.0, a * a + b * b + 2 * a * b * math.cos(t))) / (a + b)
    assert found.attenuation.tolist() == pytest.approx([exact] * 2, abs=1e-9)
    assert found.norm_ratio.tolist() == pytest.approx([max(a / b, b / a)] * 2)
    assert found.predicted.tolist() == pytest.approx([math.cos(t / 2)] * 2, abs=1e-9)


def test_the_losses_that_the_paper_names() -> None:
    """METHODS: 0.234 at 80 degrees, 0.076 at 45."""
    for degrees, loss in ((80, 0.234), (45, 0.076)):
        t = math.radians(degrees)
        found = drift(bank_of([1.0, 0.0], [math.cos(t), math.sin(t)]), relative=False)
        assert 1 - float(found.attenuation[0]) == pytest.approx(loss, abs=5e-4)


def test_agreement_runs_from_cancelling_to_equal() -> None:
    same = drift(bank_of([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), relative=False)
    assert same.agreement.tolist() == pytest.approx([1, 1])
    square = drift(bank_of([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]), relative=False)
    assert square.agreement.tolist() == pytest.approx([0, 0], abs=1e-12)
    assert square.predicted.tolist() == pytest.approx([1 / math.sqrt(3)] * 2)
    against = drift(bank_of([1.0, 0], [-1.0, 0]), relative=False)
    assert (against.agreement < 0).all()


def test_relative_to_theta_0_is_about_what_training_changed() -> None:
    near = bank_of([10.0, 1.0], [10.0, -1.0], base=[10.0, 0.0])
    assert float(drift(near, relative=False).mean_angle[0]) < 12
    assert float(drift(near, relative=True).mean_angle[0]) == pytest.approx(180)
    with pytest.raises(CheckpointError, match="theta_0"):
        drift(bank_of([1.0, 0.0]), relative=True)


def test_tiny_angles_and_zero_rows() -> None:
    X = torch.tensor([[1.0, 0.0], [1.0, 1e-9], [0.0, 0.0]], dtype=torch.float64)
    found = angles(X)
    assert float(found[0, 1]) == pytest.approx(math.degrees(1e-9), rel=1e-6)
    assert found[2].tolist() == [0, 0, 0]
    torch.testing.assert_close(found, found.T)


def test_every_parameter_is_in_one_block() -> None:
    bank = Bank.of(Net(), expert_states(2))
    covered = sorted((s.start, s.stop) for columns in parameter_blocks(bank).values() for s in columns)
    assert covered[0][0] == 0
    assert covered[-1][1] == bank.P
    assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))
    assert list(parameter_blocks(bank))[-1] == "head"
