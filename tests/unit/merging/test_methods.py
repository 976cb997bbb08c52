"""The simple methods by hand, and the library's few lines."""

from __future__ import annotations

import math

import pytest
import torch

from fedmerge.errors import CheckpointError, ScenarioError
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.curvature.fisher import diagonal
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import load_method
from tests.banks import a_bank, a_batch
from tests.conftest import Net, expert_states


def test_the_mean_and_the_weighted_mean_by_hand() -> None:
    bank = a_bank(expert_states(2, 1))
    torch.testing.assert_close(load_method("mean").merge(bank), (bank.theta[0] + bank.theta[1]) / 2)
    torch.testing.assert_close(load_method("weighted_mean").merge(bank), 0.75 * bank.theta[0] + 0.25 * bank.theta[1])


def test_the_weighted_mean_needs_counts() -> None:
    with pytest.raises(CheckpointError, match="no image counts"):
        load_method("weighted_mean").merge(Bank.of(Net(), expert_states(2)))


def test_the_ensemble_by_hand() -> None:
    """p_1 = (0.9, 0.1) and p_2 = (0.5, 0.5)."""

    class Said(Evidence):
        logits = torch.tensor([[[math.log(0.9), math.log(0.1)]], [[math.log(0.5), math.log(0.5)]]])

        def view_logits(self, view: str) -> torch.Tensor:
            return self.logits

    said = Said(a_bank(expert_states(2)), a_batch(1))
    torch.testing.assert_close(load_method("ensemble").predict(said), torch.tensor([[0.7, 0.3]]))
    torch.testing.assert_close(load_method("ensemble", average="logits").predict(said), torch.tensor([[0.75, 0.25]]))


def test_dcs_follows_the_surest_expert_of_each_image() -> None:
    bank, batch = a_bank(expert_states(3, 1, spread=2.0)), a_batch(20)
    evidence = Evidence(bank, batch)
    found = load_method("dcs", calibrated=False).predict(evidence)
    p = bank.expert_logits(batch).softmax(-1)
    for i in range(20):
        entropies = [-sum(float(x) * math.log(x) for x in p[k, i] if x > 0) for k in range(3)]
        torch.testing.assert_close(found[i], p[entropies.index(min(entropies)), i], rtol=1e-9, atol=1e-12)


def test_an_expert_alone() -> None:
    bank, batch = a_bank(expert_states(3, 1)), a_batch()
    keys = [one.key for one in load_method("expert").expand(bank.names)]
    assert keys == ["expert:site-0", "expert:site-1", "expert:site-2"]
    found = load_method("expert", site="site-1").predict(Evidence(bank, batch))
    torch.testing.assert_close(found, bank.expert_logits(batch)[1].softmax(-1))
    with pytest.raises(ScenarioError, match="did you mean 'site-1'"):
        load_method("expert", site="site-11").predict(Evidence(bank, batch))


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ScenarioError, match="did you mean 'mean'"):
        load_method("meen")


def test_library_use_is_a_few_lines() -> None:
    bank = Bank.of(Net(), {"a": expert_states(2)[0], "b": expert_states(2)[1]})
    merged = bank.state_dict(load_method("mean").merge(bank))
    found = load_method("eam", gamma=5).coefficients(Evidence(bank, a_batch(dtype=torch.float32)))
    logits = bank.forward(bank.mix(found.encoder, found.head), a_batch(dtype=torch.float32))
    assert set(merged) == set(Net().state_dict())
    assert logits.shape == (6, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_of_weights_alone(dtype: torch.dtype) -> None:
    """What is computed from them is rounded once, and temperatures and coefficients are no weights."""
    bank = a_bank(expert_states(3, 1), dtype)
    assert bank.temperatures.tolist() == pytest.approx([0.8, 1.0, 1.3], rel=1e-7)
    assert load_method("adamerging").start(bank)["c"].tolist() == [[pytest.approx(0.3, rel=1e-7)]] * 3  # type: ignore[attr-defined]
    exact = 0.7 * bank.anchor_row("theta_0").double() + 0.3 * bank.theta.double().mean(0)
    once = 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(load_method("wise_ft", a=0.3).merge(bank).double(), exact, rtol=once, atol=1e-7)


def test_squares_of_small_gradients_are_not_lost() -> None:
    """log p = -log 2, and its gradient x / 2: of 5e-5 the square is 0 in float16."""
    theta, x = torch.zeros(2, dtype=torch.float16), torch.full((3, 1), 1e-4, dtype=torch.float16)
    wanted = torch.full((2,), 2.5e-9)
    for estimator in ("exact", "mc"):
        found = diagonal(lambda theta, x: x @ theta.reshape(1, 2), theta, x, estimator)  # type: ignore[arg-type]
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)
