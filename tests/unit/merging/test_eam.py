"""Entropy-adaptive merging against a float64 computation written differently, by hand, and in its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import load_method
from fedmerge.merging.methods.eam import Eam, entropy_gap, inverse_entropy
from fedmerge.merging.scoring.views import VIEWS
from tests.conftest import Net, expert_states


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def plain_entropy(p: np.ndarray) -> float:
    return -sum(float(x) * math.log(x) for x in p if x > 0)


def plain_jsd(p: np.ndarray, q: np.ndarray) -> float:
    m = (p + q) / 2
    return plain_entropy(m) - (plain_entropy(p) + plain_entropy(q)) / 2


def reference(bank: Bank, batch: torch.Tensor, gamma: float) -> tuple[list[float], list[float]]:
    """Eq. 3, 4, 8 and 9 with loops over samples, for the default scorer and views."""
    C = 3
    clean = [softmax(z.numpy()) for z in bank.expert_logits(batch)]
    views = [[softmax(z.numpy()) for z in bank.expert_logits(VIEWS[v](batch))] for v in ("shift", "contrast")]
    H = [sum(plain_entropy(p) for p in rows) / len(rows) for rows in clean]
    A = [
        1
        - sum(plain_jsd(p, q) for view in views for p, q in zip(clean[k], view[k], strict=True)) / (len(clean[k]) * 2) / math.log(2)
        for k in range(bank.K)
    ]
    inverse = [1 / (h + 1e-8) for h in H]
    S = [a - h / math.log(C) for a, h in zip(A, H, strict=True)]
    k = S.index(max(S))
    gap = [math.exp(-gamma * abs(h - H[k])) for h in H]
    return [x / sum(inverse) for x in inverse], [x / sum(gap) for x in gap]


def world(seed: int = 0, K: int = 3, n: int = 7) -> tuple[Bank, torch.Tensor]:
    bank = Bank.of(Net(), expert_states(K, seed, spread=2.0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return bank, torch.randn(n, 1, 10, 10, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma", [1.0, 10.0])
def test_the_equations_against_loops(seed: int, gamma: float) -> None:
    bank, batch = world(seed)
    found = load_method("eam", gamma=gamma).coefficients(Evidence(bank, batch))
    encoder, head = reference(bank, batch, gamma)
    torch.testing.assert_close(found.encoder, torch.tensor(encoder, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.head, torch.tensor(head, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_by_hand() -> None:
    """The worked example of the docstring: H = (0.1, 0.3), k* = 1, gamma = 10."""
    H = torch.tensor([0.1, 0.3], dtype=torch.float64)
    torch.testing.assert_close(inverse_entropy(H, 1e-12), torch.tensor([0.75, 0.25], dtype=torch.float64))
    head = entropy_gap((H - H[0]).abs(), 10.0)
    torch.testing.assert_close(head, torch.tensor([0.8807970779778823, 0.11920292202211757], dtype=torch.float64))


def test_equal_entropies_give_the_mean() -> None:
    bank = Bank.of(Net(), expert_states(1) * 3, dtype=torch.float64)
    found = load_method("eam").coefficients(Evidence(bank, world()[1]))
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(found.encoder, third)
    torch.testing.assert_close(found.head, third)


def test_gamma_zero_is_a_uniform_head_and_infinite_gamma_selects_one() -> None:
    bank, batch = world()
    evidence = Evidence(bank, batch)
    torch.testing.assert_close(
        load_method("eam", gamma=0).coefficients(evidence).head, torch.full((3,), 1 / 3, dtype=torch.float64)
    )
    hard = load_method("eam", gamma=float("inf")).coefficients(evidence)
    assert sorted(hard.head.tolist()) == [0, 0, 1]
    assert hard.head.argmax() == hard.notes["chosen"][0]
    assert load_method("eam", gamma="inf").gamma == math.inf


def test_infinite_gamma_shares_among_ties() -> None:
    assert entropy_gap(torch.tensor([0.0, 0.0, 0.2]), math.inf).tolist() == [0.5, 0.5, 0]


def test_rho_zero_is_no_average_and_a_past_is_weighed() -> None:
    bank, batch = world()
    _, other = world(1)
    first, second = Evidence(bank, batch), Evidence(bank, other)
    for plain in (load_method("eam", rho=0), load_method("eam", ema="off")):
        state, _ = plain.step(plain.start(bank), first)
        assert torch.equal(plain.step(state, second)[1].encoder, plain.coefficients(second).encoder)
    smooth = load_method("eam", rho=0.9)
    state, one = smooth.step(smooth.start(bank), first)
    state, two = smooth.step(state, second)
    assert torch.equal(one.encoder, smooth.coefficients(first).encoder)
    for part in ("encoder", "head"):
        wanted = 0.9 * getattr(smooth.coefficients(first), part) + 0.1 * getattr(smooth.coefficients(second), part)
        torch.testing.assert_close(getattr(two, part), wanted, rtol=1e-12, atol=1e-14)


def test_a_uniform_past() -> None:
    bank, batch = world()
    method = load_method("eam", ema_init="uniform", rho=0.5)
    alone = method.coefficients(Evidence(bank, batch)).encoder
    _, found = method.step(method.start(bank), Evidence(bank, batch))
    torch.testing.assert_close(found.encoder, (alone + 1 / 3) / 2)


def test_the_entropy_average_smooths_before_the_equations() -> None:
    bank, batch = world()
    _, other = world(1)
    method = load_method("eam", ema="entropy", rho=0.5)
    state, _ = method.step({}, Evidence(bank, batch))
    _, found = method.step(state, Evidence(bank, other))
    H = (Evidence(bank, batch).batch_entropies() + Evidence(bank, other).batch_entropies()) / 2
    torch.testing.assert_close(found.encoder, inverse_entropy(H, 1e-8))


@pytest.mark.parametrize("scorer", ["norm_diff", "raw_diff", "product", "ratio", "entropy_only", "rank_sum"])
@pytest.mark.parametrize("consistency", ["jsd", "tv", "cos", "agree", "kl"])
def test_every_scorer_and_consistency_is_on_the_simplex(scorer: str, consistency: str) -> None:
    bank, batch = world()
    found = load_method("eam", scorer=scorer, consistency=consistency).coefficients(Evidence(bank, batch))
    for part in (found.encoder, found.head):
        assert float(part.min()) >= 0
        torch.testing.assert_close(part.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_variants() -> None:
    bank, batch = world()
    evidence = Evidence(bank, batch)

    def found(variant: str) -> tuple[list[float], list[float]]:
        c = load_method("eam", variant=variant).coefficients(evidence)
        return c.encoder.tolist(), c.head.tolist()

    both = found("both")
    assert found("entropy_only") == (both[0], both[0])
    assert found("head_only") == (pytest.approx([1 / 3] * 3), both[1])
    assert found("gap_all") == (both[1], both[1])
    H = evidence.batch_entropies()
    assert found("argmin_entropy")[0][int(H.argmin())] == 1
    assert found("softmax_entropy")[0] == pytest.approx(torch.softmax(-H, 0).tolist())


@pytest.mark.parametrize(
    ("fields", "forwards"),
    [({}, 9), ({"scorer": "entropy_only"}, 3), ({"variant": "entropy_only"}, 3), ({"augs": ["shift"]}, 6)],
)
def test_forwards_are_what_the_cost_formula_says(fields: dict[str, object], forwards: int) -> None:
    """K (1 + R) expert passes where A is needed, K where it is not."""
    bank, batch = world()
    evidence = Evidence(bank, batch)
    with evidence.billed() as bill:
        load_method("eam", **fields).coefficients(evidence)
    assert bill.forwards == forwards == evidence.forwards_run


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 100))
def test_the_order_of_experts_is_irrelevant(order: list[int], seed: int) -> None:
    states = expert_states(4, seed, spread=2.0)
    batch = world(seed)[1]
    here = load_method("eam").coefficients(Evidence(Bank.of(Net(), states, dtype=torch.float64), batch))
    there = load_method("eam").coefficients(Evidence(Bank.of(Net(), [states[k] for k in order], dtype=torch.float64), batch))
    torch.testing.assert_close(there.encoder, here.encoder[order])
    torch.testing.assert_close(there.head, here.head[order])


def test_an_expert_of_nan_gets_no_weight_and_is_noted() -> None:
    bank, batch = world()
    bank.theta[1] = torch.nan
    found = load_method("eam").coefficients(Evidence(bank, batch))
    assert found.encoder[1] == found.head[1] == 0
    assert found.notes["invalid"] == [1]
    torch.testing.assert_close(found.encoder.sum() + found.head.sum(), torch.tensor(2.0, dtype=torch.float64))
    assert torch.isfinite(bank.forward(bank.mix(found.encoder, found.head), batch, found.encoder)).all()


def test_all_experts_of_nan_give_the_mean() -> None:
    bank, batch = world()
    bank.theta.fill_(torch.nan)
    found = load_method("eam").coefficients(Evidence(bank, batch))
    assert found.encoder.tolist() == found.head.tolist() == pytest.approx([1 / 3] * 3)


def test_a_broken_expert_leaves_the_average_when_it_recovers() -> None:
    bank, batch = world()
    method, good = load_method("eam"), bank.theta[1].clone()
    bank.theta[1] = torch.nan
    state, _ = method.step({}, Evidence(bank, batch))
    bank.theta[1] = good
    _, found = method.step(state, Evidence(bank, batch))
    torch.testing.assert_close(found.encoder.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert found.encoder[1] > 0


def test_hyper_parameters_are_checked() -> None:
    with pytest.raises(ValidationError, match="gama"):
        load_method("eam", gama=1)
    for bad in ({"rho": 1}, {"eps": 0}, {"gamma": -1}, {"augs": []}, {"scorer": "best"}):
        with pytest.raises(ValidationError):
            load_method("eam", **bad)
    assert Eam().model_dump()["kind"] == "eam"
