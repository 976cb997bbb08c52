"""Laws that every method keeps, over the whole folder, and the simple methods by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fedmerge.errors import CheckpointError, ScenarioError
from fedmerge.merge import load
from fedmerge.merge.bank import Bank
from fedmerge.merge.evidence import Evidence
from fedmerge.merge.method import METHODS, Adaptive, Method, Online, Output, Static
from tests.conftest import Net, expert_states

NAMES = METHODS.names


def a_bank(states: list[dict[str, torch.Tensor]], dtype: torch.dtype = torch.float64, order: list[int] | None = None) -> Bank:
    order = order or list(range(len(states)))
    counts, temperatures = [30, 10, 20, 40], [0.8, 1.0, 1.3, 0.9]
    return Bank.of(
        Net(),
        {f"site-{k}": states[k] for k in order},
        expert_states(1, 99)[0],
        counts=[counts[k] for k in order],
        temperatures=[temperatures[k] for k in order],
        dtype=dtype,
    )


def a_batch(n: int = 6, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, 1, 10, 10, generator=torch.Generator().manual_seed(3), dtype=dtype)


def rows(method: Method, bank: Bank) -> tuple[Method, ...]:
    return method.expand(bank.names) if isinstance(method, Output) else (method,)


def outcome(method: Method, bank: Bank, batch: torch.Tensor) -> torch.Tensor:
    """What a method predicts, (N, C) probabilities, whatever its kind."""
    evidence = Evidence.of(bank, batch)
    if isinstance(method, Output):
        return method.predict(evidence)
    if isinstance(method, Static):
        return bank.forward(method.merge(bank), batch, method.statistics(bank)).softmax(-1)
    if isinstance(method, Online):
        return bank.forward(method.step(method.start(bank), evidence)[1], batch).softmax(-1)
    assert isinstance(method, Adaptive)
    _, c = method.step(method.start(bank), evidence)
    if c.encoder.ndim == 2:
        each = [bank.forward(bank.mix(e, h), x[None], e) for e, h, x in zip(c.encoder, c.head, batch, strict=True)]
        return torch.cat(each).softmax(-1)
    return bank.forward(bank.mix(c.encoder, c.head), batch, c.encoder).softmax(-1)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_experts_is_irrelevant(name: str) -> None:
    if "order" in METHODS.load(name).exceptions:
        return
    states, order = expert_states(4, 1, spread=1.0), [2, 0, 3, 1]
    here, there = a_bank(states), a_bank(states, order=order)
    for one in rows(load(name), here):
        torch.testing.assert_close(outcome(one, there, a_batch()), outcome(one, here, a_batch()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_identical_experts_are_a_fixed_point(name: str) -> None:
    if "fixed_point" in METHODS.load(name).exceptions:
        return
    states = expert_states(1, 1) * 3
    bank = a_bank(states)
    alone = bank.expert_logits(a_batch())[0].softmax(-1)
    for one in rows(load(name), bank):
        if "temperature" not in one.needs:
            torch.testing.assert_close(outcome(one, bank, a_batch()), alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_stay_as_they_are_and_no_gradient_is_kept(name: str) -> None:
    bank, batch = a_bank(expert_states(3, 1)), a_batch()
    theta, base, kept = bank.theta.clone(), bank.base.clone(), batch.clone()
    table = bank.buffers.fixed["table"].clone()
    for one in rows(load(name), bank):
        found = outcome(one, bank, batch)
        assert not found.requires_grad or one.gradient
        torch.testing.assert_close(found.sum(-1), torch.ones(len(batch), dtype=torch.float64))
    assert torch.equal(bank.theta, theta)
    assert torch.equal(bank.base, base)
    assert torch.equal(batch, kept)
    assert torch.equal(bank.buffers.fixed["table"], table)


@pytest.mark.parametrize("name", NAMES)
def test_coefficients_are_on_the_simplex(name: str) -> None:
    method = load(name)
    if isinstance(method, Adaptive) and "simplex" not in method.exceptions:
        bank = a_bank(expert_states(3, 1, spread=2.0))
        _, c = method.step(method.start(bank), Evidence.of(bank, a_batch()))
        for part in (c.encoder, c.head):
            assert float(part.min()) >= 0
            torch.testing.assert_close(part.sum(-1), torch.ones_like(part.sum(-1)))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    states = expert_states(3, 1)
    for one in rows(load(name), a_bank(states)):
        assert torch.equal(outcome(one, a_bank(states), a_batch()), outcome(one, a_bank(states), a_batch()))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_runs(name: str) -> None:
    bank = a_bank(expert_states(3, 1), torch.bfloat16)
    for one in rows(load(name), bank):
        assert torch.isfinite(outcome(one, bank, a_batch(dtype=torch.bfloat16)).float()).all()


@pytest.mark.parametrize("name", NAMES)
def test_one_expert_and_one_image_are_enough(name: str) -> None:
    bank = a_bank(expert_states(1, 1))
    for one in rows(load(name), bank):
        assert outcome(one, bank, a_batch(1)).shape == (1, 3)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_says_where_it_comes_from(name: str) -> None:
    method = load(name)
    assert any(character.isdigit() for character in method.paper) or name == "expert"
    assert METHODS.load(name).__doc__


def test_the_mean_and_the_weighted_mean_by_hand() -> None:
    bank = a_bank(expert_states(2, 1))
    torch.testing.assert_close(load("mean").merge(bank), (bank.theta[0] + bank.theta[1]) / 2)
    torch.testing.assert_close(load("weighted_mean").merge(bank), 0.75 * bank.theta[0] + 0.25 * bank.theta[1])


def test_the_weighted_mean_needs_counts() -> None:
    with pytest.raises(CheckpointError, match="no image counts"):
        load("weighted_mean").merge(Bank.of(Net(), expert_states(2)))


def test_the_ensemble_by_hand() -> None:
    """p_1 = (0.9, 0.1) and p_2 = (0.5, 0.5)."""

    class Said(Evidence):
        logits = torch.tensor([[[math.log(0.9), math.log(0.1)]], [[math.log(0.5), math.log(0.5)]]])

        def view_logits(self, view: str) -> torch.Tensor:
            return self.logits

    said = Said(a_bank(expert_states(2)), a_batch(1))
    torch.testing.assert_close(load("ensemble").predict(said), torch.tensor([[0.7, 0.3]]))
    torch.testing.assert_close(load("ensemble", average="logits").predict(said), torch.tensor([[0.75, 0.25]]))


def test_dcs_follows_the_surest_expert_of_each_image() -> None:
    bank, batch = a_bank(expert_states(3, 1, spread=2.0)), a_batch(20)
    evidence = Evidence.of(bank, batch)
    found = load("dcs", calibrated=False).predict(evidence)
    p = bank.expert_logits(batch).softmax(-1)
    for i in range(20):
        entropies = [-sum(float(x) * math.log(x) for x in p[k, i] if x > 0) for k in range(3)]
        torch.testing.assert_close(found[i], p[entropies.index(min(entropies)), i], rtol=1e-9, atol=1e-12)


def test_an_expert_alone() -> None:
    bank, batch = a_bank(expert_states(3, 1)), a_batch()
    keys = [one.key for one in load("expert").expand(bank.names)]
    assert keys == ["expert:site-0", "expert:site-1", "expert:site-2"]
    found = load("expert", site="site-1").predict(Evidence.of(bank, batch))
    torch.testing.assert_close(found, bank.expert_logits(batch)[1].softmax(-1))
    with pytest.raises(ScenarioError, match="did you mean 'site-1'"):
        load("expert", site="site-11").predict(Evidence.of(bank, batch))


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ScenarioError, match="did you mean 'mean'"):
        load("meen")


def test_library_use_is_a_few_lines() -> None:
    bank = Bank.of(Net(), {"a": expert_states(2)[0], "b": expert_states(2)[1]})
    merged = bank.state_dict(load("mean").merge(bank))
    found = load("eam", gamma=5).coefficients(Evidence.of(bank, a_batch(dtype=torch.float32)))
    logits = bank.forward(bank.mix(found.encoder, found.head), a_batch(dtype=torch.float32))
    assert set(merged) == set(Net().state_dict())
    assert logits.shape == (6, 3)
