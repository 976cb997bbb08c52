"""Laws that every method keeps, over the whole folder and variants of its methods: a new file is tested without an edit here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import METHODS, Adaptive, Method, Output, load_method
from fedmerge.merging.per_sample.dispatch import PerSample
from fedmerge.merging.predict import predict, rows_of
from tests.banks import a_bank, a_batch, an_answer, coefficients, outcome
from tests.conftest import expert_states


@dataclass(frozen=True)
class Case:
    """One method with some hyper-parameters."""

    name: str
    given: dict[str, Any] = field(default_factory=dict)

    def method(self) -> Method:
        return load_method(self.name, **self.given)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.given.items())])


VARIANTS = {
    "ties": [{"combine": "sum"}, {"keep": 1.0}, {"keep": 0.0}],
    "dare": [{"then": "ties"}, {"drop": 0.0}],
    "slerp": [{"many": "tangent"}, {"many": "sequential"}, {"of": "tau"}],
    "model_stock": [{"average": "angle"}, {"filter_wise": True}],
    "mixup": [{"draws": 3}],
    "fisher": [{"mode": "target"}, {"mode": "target", "estimator": "mc"}, {"normalize": False}],
    "regmean": [{"ratio": 0.9}],
    "adamerging": [{"level": "layer"}, {"clamp": False}, {"steps": 2}],
    "t3": [
        {"generalist": "theta_0"}, {"generalist": "generalist"}, {"k_rule": "joint"}, {"k_rule": "no_generalist"},
        {"map": "rescaled"}, {"map": "scaled_sigmoid"}, {"signal": "confidence_ratio"}, {"signal": "entropy_ratio"},
        {"signal": "one_minus_entropy_ratio", "k_rule": "joint"},
    ],
    "t3_batch": [{"generalist": "theta_0"}],
    "dawin": [
        {"offset": True}, {"scope": "prefix"}, {"scope": "full", "offset": True}, {"clustering": "dirichlet"},
        {"clustering": "beta"}, {"clustering": "scope_mean"}, {"form": "code"}, {"form": "paper"}, {"wise_alpha": 0.5},
        {"clusters": 1},
        *({"score": score} for score in ("maxlogit_softmax", "confidence", "confidence_difference", "uniform", "normal_05")),
    ],
    "dawin_sample": [{"score": "pseudo_ensemble_soft"}, {"score": "pseudo_merged_hard"}],
    "doe": [{"offset": True}],
    "oracle": [{"by": by} for by in ("domain", "select", "batch", "stream")],
    "eam": [{"variant": variant} for variant in ("entropy_only", "head_only", "gap_all", "argmin_entropy", "softmax_entropy")]
    + [{"ema_init": "uniform"}, {"ema": "entropy"}, {"ema": "gap_score"}],
    "posterior": [{"granularity": "batch"}, {"active": "auto"}, {"beta": 0.0}, {"head_beta": 0.0}],
    "mean": [{"head_policy": "mean"}],
    "iso_cts": [{"share": 0.0}, {"share": 0.5}],
    "lines": [{"of": "ties"}, {"of": {"slerp": {"of": "tau"}}}, {"of": "weighted_mean"}, {"b": -0.3}],
    "consensus_ta": [{"least": 1}],
    "breadcrumbs": [{"beta": 0.3, "gamma": 0.3}],
    "lame": [{"of": "ties"}, {"k": 2}],
    "della": [{"rank_in": "tensor"}, {"combine": "sum"}, {"window": 0.0}],
}  # fmt: skip

CASES = [Case(name, given) for name in METHODS.names for given in ({}, *VARIANTS.get(name, ()))]


def rows(method: Method, bank: Bank) -> tuple[Method, ...]:
    return method.expand(bank.names)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_order_of_experts_is_irrelevant(case: Case) -> None:
    if "order" in case.method().exceptions:
        return
    for order in ([2, 0, 3, 1], [1, 0]):
        states = expert_states(len(order), 1, spread=1.0)
        here, there = a_bank(states), a_bank(states, order=order)
        for one in rows(case.method(), here):
            torch.testing.assert_close(outcome(one, there, a_batch()), outcome(one, here, a_batch()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_identical_experts_are_a_fixed_point(case: Case) -> None:
    """Anchors included: where all models are one, so is what a method makes of them."""
    states = expert_states(1, 1) * 3
    bank = a_bank(states, base=states[0])
    alone = bank.expert_logits(a_batch())[0].softmax(-1)
    for one in rows(case.method(), bank):
        if isinstance(one, Output) and "temperature" in one.needs:
            continue  # its probabilities are calibrated, each site's by its own temperature
        if "fixed point" in one.exceptions:
            continue
        torch.testing.assert_close(outcome(one, bank, a_batch()), alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_stay_as_they_are_and_no_gradient_is_kept(case: Case) -> None:
    bank, batch = a_bank(expert_states(3, 1)), a_batch()
    theta, base, kept = bank.theta.clone(), bank.base.clone(), batch.clone()
    table = bank.buffers.fixed["table"].clone()
    for one in rows(case.method(), bank):
        found = outcome(one, bank, batch)
        assert not found.requires_grad or one.gradient
        torch.testing.assert_close(found.sum(-1), torch.ones(len(batch), dtype=torch.float64))
    assert torch.equal(bank.theta, theta)
    assert torch.equal(bank.base, base)
    assert torch.equal(batch, kept)
    assert torch.equal(bank.buffers.fixed["table"], table)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_coefficients_are_on_the_simplex(case: Case) -> None:
    method = case.method()
    if isinstance(method, Adaptive) and "simplex" not in method.exceptions:
        bank = a_bank(expert_states(3, 1, spread=2.0))
        c = coefficients(method, Evidence(bank, a_batch()))
        for part in (c.encoder, c.head):
            assert float(part.min()) >= 0
            torch.testing.assert_close(part.sum(-1), torch.ones_like(part.sum(-1)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_expert_that_says_no_numbers_has_no_coefficient(case: Case) -> None:
    """Neither in its first batch nor after good ones: the merge would be NaN, and all of its predictions even."""
    method = case.method()
    if not isinstance(method, Adaptive) or "broken" in method.exceptions:
        return
    for good in (0, 2):
        bank, state = a_bank(expert_states(3, 1)), method.start(a_bank(expert_states(3, 1)))
        batches = [a_batch(6, seed=t) for t in range(good + 1)]
        with torch.no_grad():
            for t, batch in enumerate(batches):
                if t == good:
                    bank.rows[1] = torch.nan
                evidence = Evidence(bank, batch)
                with evidence.opened(an_answer(6)):
                    past = method.survey({}, evidence) if method.transductive else state
                    state, c = method.step(past, evidence)
        for part in (c.encoder, c.head):
            assert (part[..., 1] == 0).all()
            torch.testing.assert_close(part.sum(-1), torch.ones_like(part.sum(-1)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_seed_gives_the_same_bits(case: Case) -> None:
    states = expert_states(3, 1)
    for one in rows(case.method(), a_bank(states)):
        assert torch.equal(outcome(one, a_bank(states), a_batch()), outcome(one, a_bank(states), a_batch()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision_runs(case: Case) -> None:
    bank = a_bank(expert_states(3, 1), torch.bfloat16)
    for one in rows(case.method(), bank):
        assert torch.isfinite(outcome(one, bank, a_batch(dtype=torch.bfloat16)).float()).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_expert_and_one_image_are_enough(case: Case) -> None:
    bank = a_bank(expert_states(1, 1))
    for one in rows(case.method(), bank):
        assert outcome(one, bank, a_batch(1)).shape == (1, 3)


def forwards(part: str, K: int) -> int:
    """3K, K, or a number."""
    return int(part[:-1] or 1) * K if part.endswith("K") else int(part)


@pytest.mark.parametrize("name", METHODS.names)
def test_a_batch_costs_what_the_method_declares(name: str) -> None:
    """With default hyper-parameters, experts near theta_0, and a mixture for samples with models of their own."""
    for K in (2, 3, 4):
        states = expert_states(K, spread=0.001)
        bank = a_bank(states, base=states[0])
        (kept, *_) = rows_of([load_method(name)], bank).values()
        evidence = Evidence(bank, a_batch(4))
        with torch.no_grad(), evidence.billed() as bill, evidence.opened(an_answer(4)):
            found = predict(kept, evidence, PerSample(bank, "mixture"))
        declared = sum(forwards(part, K) for part in METHODS.load(name).cost.split(" + "))
        spent = kept.method.forwards_alone(bill.forwards, K) + found.forwards
        assert declared - ("cost" in kept.method.exceptions) <= spent <= declared


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_method_says_where_it_comes_from(case: Case) -> None:
    method = case.method()
    assert any(character.isdigit() for character in method.paper) or case.name == "expert"
    assert case.method().__doc__
