"""Posteriors of sites and labels: EM against a loop in numpy, closed forms, and what happens where nothing can be known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import load_method
from fedmerge.merging.methods.posterior import _scores
from fedmerge.merging.scoring.latent import ITERATIONS, explain, label_shares, pays, under
from tests.banks import a_bank, a_batch
from tests.conftest import Net, expert_states


def drawn(N: int, K: int, C: int, seed: int, sharp: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(K, N, C, generator=generator, dtype=torch.float64)
    return torch.randn(N, K, generator=generator, dtype=torch.float64), logits.log_softmax(-1)


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(2, 5), st.integers(0, 99))
def test_em_is_that_of_a_loop(N: int, K: int, C: int, seed: int) -> None:
    s, log_p = drawn(N, K, C, seed, 6.0)
    p, sites = np.exp(log_p.numpy()), np.full(K, 1 / K)

    def loop(free: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        pi, b = sites.copy(), np.full(C, 1 / C)
        for step in range(ITERATIONS + 1):
            joint = np.array(
                [[[pi[k] * math.exp(s[i, k]) * p[k, i, c] * b[c] * C for c in range(C)] for k in range(K)] for i in range(N)]
            )
            weight = joint.sum((1, 2), keepdims=True)
            both = joint / weight
            if step == ITERATIONS:
                return both.sum(2), pi, b, float(np.log(weight).sum())
            pi = (both.sum((0, 2)) + 1 / K) / (N + 1)
            b = (both.sum((0, 1)) + 1 / C) / (N + 1) if free else b
        raise AssertionError

    plain, free = loop(False), loop(True)
    found = explain(s, log_p, torch.from_numpy(sites))
    wanted = free if pays(free[3] - plain[3], N, C) else plain
    for mine, theirs in zip((found.r, found.sites, found.labels), wanted[:3], strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-9)
    assert found.gain == pytest.approx(free[3] - plain[3], abs=1e-8)


def test_a_batch_of_one_class_is_seen_and_one_of_all_is_left_alone() -> None:
    """20 images that two of four classes explain about equally, all of one class; and 5 of each."""
    near = torch.tensor([0.5, 0.4, 0.05, 0.05]).log()
    one = label_shares(near.expand(20, 4))
    assert one[0] > 0.9
    assert under(one, near.expand(20, 4)).exp()[0, 0] > 0.9
    each = torch.cat([near.roll(shift).expand(5, 4) for shift in range(4)])
    assert torch.equal(label_shares(each), torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(under(label_shares(each), each), each)


def test_what_shares_must_gain_is_bic() -> None:
    assert pays(3 / 2 * math.log(20) + 1e-6, 20, 4)
    assert not pays(3 / 2 * math.log(20) - 1e-6, 20, 4)


def test_a_single_image_moves_no_labels() -> None:
    sure = torch.tensor([[0.999, 0.0005, 0.0005]]).log()
    assert torch.equal(label_shares(sure), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_the_worked_example() -> None:
    log_p, log_q = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]).log(), torch.tensor([[0.7, 0.3]]).log()
    s = _scores("cross", log_p, log_q)[:, 0]
    torch.testing.assert_close(s, torch.tensor([-0.766, -1.473]), atol=1e-3, rtol=0)
    torch.testing.assert_close(s.softmax(0), torch.tensor([0.670, 0.330]), atol=1e-3, rtol=0)
    torch.testing.assert_close(_scores("agreement", log_p, log_q)[:, 0].exp(), torch.tensor([0.66, 0.5]))


def test_an_expert_without_numbers_has_no_share() -> None:
    states = expert_states(3)
    broken = {name: torch.full_like(value, torch.nan) if name == "head.weight" else value for name, value in states[1].items()}
    bank = a_bank(states)
    bank.rows[1, bank.head] = torch.nan
    assert torch.isnan(broken["head.weight"]).all()
    with torch.no_grad():
        found = load_method("posterior").step(load_method("posterior").start(bank), Evidence(bank, a_batch()))[1]  # type: ignore[attr-defined]
    assert (found.encoder[:, 1] == 0).all()
    torch.testing.assert_close(found.encoder.sum(1), torch.ones(len(found.encoder), dtype=torch.float64))


def test_without_theta_0_the_panel_is_what_there_is() -> None:
    bank = Bank.of(Net(), expert_states(2))
    with torch.no_grad():
        found = load_method("posterior").coefficients(Evidence(bank, a_batch()))  # type: ignore[attr-defined]
    assert found.notes["panel"] == [1, 1, 0, 0]


def test_experts_of_which_none_is_better_share_evenly_and_it_is_noted() -> None:
    """All of them are sure, and each of another class."""
    bank = a_bank(expert_states(3))
    evidence = Evidence(bank, a_batch(6))
    logits = torch.full((3, 6, 3), -40.0)
    logits[torch.arange(3), :, torch.arange(3)] = 40.0
    evidence.recall({"none": logits})
    with torch.no_grad():
        found = load_method("posterior", panel=("ensemble",)).coefficients(evidence)  # type: ignore[attr-defined]
    torch.testing.assert_close(found.encoder, torch.full((6, 3), 1 / 3, dtype=torch.float64))
    assert found.notes["ahead"] == [pytest.approx(0, abs=1e-6)]


def test_shares_when_experts_come_and_go() -> None:
    bank = a_bank(expert_states(2))
    method = load_method("posterior")
    past = {"pi": torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)}
    found = method.carried(past, ("gone", bank.names[0], "other"), bank)["pi"]  # type: ignore[attr-defined]
    torch.testing.assert_close(found, torch.tensor([0.3, 0.5], dtype=torch.float64))
