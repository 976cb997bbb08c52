"""Label priors in heads: Bayes' rule in closed form, and through any linear merge."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmerge.errors import CheckpointError
from fedmerge.merging.prior import head_bias, log_shares, under_prior
from tests.conftest import Net, expert_states


def test_bayes_rule() -> None:
    """p'(y | x) is proportional to p(y | x) P'(y) / P(y)."""
    model, x = Net().eval(), torch.randn(5, 1, 8, 8)
    counts, target = torch.tensor([70.0, 20.0, 7.0]), torch.tensor([0.1, 0.3, 0.6]).double()
    bias = head_bias(model)
    p = model(x).softmax(1)
    wanted = p * target / ((counts + 1) / 100)
    model.load_state_dict(under_prior(model.state_dict(), bias, log_shares(counts), (3 * target).log()))
    torch.testing.assert_close(model(x).softmax(1), (wanted / wanted.sum(1, keepdim=True)).float(), atol=1e-5, rtol=1e-4)


def test_even_shares_change_nothing_and_a_merge_of_corrected_experts_is_corrected() -> None:
    model = Net()
    bias, (a, b) = head_bias(model), expert_states(2)
    torch.testing.assert_close(under_prior(a, bias, log_shares(torch.full((3,), 9)), None), a)
    one, other = (log_shares(torch.tensor(n)) for n in ([8, 1, 1], [1, 1, 8]))
    both = [under_prior(state, bias, trained, None)[bias] for state, trained in ((a, one), (b, other))]
    merged = under_prior({bias: 0.3 * a[bias] + 0.7 * b[bias]}, bias, 0.3 * one + 0.7 * other, None)[bias]
    torch.testing.assert_close(0.3 * both[0] + 0.7 * both[1], merged)


def test_a_head_without_a_bias_is_refused() -> None:
    with pytest.raises(CheckpointError, match="0 biases"):
        head_bias(nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)))
