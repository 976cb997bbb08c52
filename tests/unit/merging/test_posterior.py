"""Posteriors of sites and labels: EM against a loop in numpy, closed forms, and what happens where nothing can be known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import load_method
from fedmerge.merging.methods.posterior import BASIN, HALF_WAY, _answers, _gone, _scores
from fedmerge.merging.per_sample.dispatch import PerSample
from fedmerge.merging.predict import carry, predict, rows_of
from fedmerge.merging.scoring.agreement import answers_alike, confidences, of_the_surest, other_answers, temperature
from fedmerge.merging.scoring.latent import ITERATIONS, label_shares, pays, site_shares, under
from tests.banks import a_bank, a_batch, coefficients, outcome
from tests.conftest import Net, expert_states


def drawn(N: int, K: int, C: int, seed: int, sharp: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(K, N, C, generator=generator, dtype=torch.float64)
    return torch.randn(N, K, generator=generator, dtype=torch.float64), logits.log_softmax(-1)


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 99))
def test_em_over_sites_is_that_of_a_loop(N: int, K: int, seed: int) -> None:
    s, _ = drawn(N, K, 3, seed)
    pi = np.full(K, 1 / K)
    for _ in range(ITERATIONS):
        joint = np.array([[pi[k] * math.exp(s[i, k]) for k in range(K)] for i in range(N)])
        pi = ((joint / joint.sum(1, keepdims=True)).sum(0) + 1) / (N + K)
    joint = pi * np.exp(s.numpy())
    r, found = site_shares(s, torch.full((K,), 1 / K))
    np.testing.assert_allclose(found.numpy(), pi, atol=1e-9)
    np.testing.assert_allclose(r.numpy(), joint / joint.sum(1, keepdims=True), atol=1e-9)


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(2, 5), st.integers(0, 99))
def test_shares_of_labels_are_those_of_a_loop(N: int, C: int, seed: int) -> None:
    p = drawn(N, 1, C, seed, 6.0)[1][0].exp().numpy()
    seen = {"labels": torch.arange(C, dtype=torch.float64), "gain": torch.zeros(1, dtype=torch.float64)}
    b, stream = np.full(C, 1 / C), (np.arange(C) + 1) / (np.arange(C).sum() + C)
    for _ in range(ITERATIONS):
        y = p * b / (p * b).sum(1, keepdims=True)
        b = (y.sum(0) + 1 / C) / (N + 1)
    told = {name: float(np.log(p @ shares).sum()) for name, shares in (("b", b), ("even", np.full(C, 1 / C)), ("stream", stream))}
    found, fallback, after = label_shares(torch.from_numpy(p).log(), seen)
    stands = pays(told["b"] - max(told["even"], told["stream"]), N, C)
    np.testing.assert_allclose(found.numpy(), b if stands else np.full(C, 1 / C), atol=1e-9)
    np.testing.assert_allclose(after["labels"].numpy(), np.arange(C) + y.sum(0), atol=1e-9)
    assert float(after["gain"]) == pytest.approx(told["stream"] - told["even"], abs=1e-9)
    assert torch.equal(fallback, torch.full((C,), 1 / C, dtype=torch.float64))


NEAR = torch.tensor([0.5, 0.4, 0.05, 0.05]).log()
"""What a model says that two of four classes explain about equally."""


def test_a_batch_of_one_class_is_seen_and_one_of_all_is_left_alone() -> None:
    """20 images of one class; and 5 of each."""
    one = label_shares(NEAR.expand(20, 4))[0]
    assert one[0] > 0.9
    assert under(one, NEAR.expand(20, 4)).exp()[0, 0] > 0.9
    each = torch.cat([NEAR.roll(shift).expand(5, 4) for shift in range(4)])
    even = label_shares(each)[0]
    assert torch.equal(even, torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(under(even, each), each)


def test_what_a_model_says_of_every_batch_is_no_news_of_one() -> None:
    """The first batch of one class is believed; of a stream that looks like it all the time, shares of the batch gain nothing."""
    seen: dict[str, Tensor] = {}
    stands = []
    for _ in range(6):
        batch, stream, seen = label_shares(NEAR.expand(20, 4), seen)
        stands.append(bool(batch[0] > 0.9))
    assert stands[0]
    assert not stands[-1]
    assert stream[0] > 0.8  # but the stream's own shares have told its batches


def test_the_stream_is_not_believed_where_it_is_sorted_by_class() -> None:
    seen: dict[str, Tensor] = {}
    for shift in range(4):
        for _ in range(3):
            _, stream, seen = label_shares(torch.tensor([0.97, 0.01, 0.01, 0.01]).log().roll(shift).expand(20, 4), seen)
        if shift:
            assert torch.equal(stream, torch.full((4,), 0.25, dtype=torch.float64))


def test_what_shares_must_gain_is_bic() -> None:
    assert pays(3 / 2 * math.log(20) + 1e-6, 20, 4)
    assert not pays(3 / 2 * math.log(20) - 1e-6, 20, 4)


def test_a_single_image_moves_no_labels() -> None:
    sure = torch.tensor([[0.999, 0.0005, 0.0005]]).log()
    assert torch.equal(label_shares(sure)[0], torch.full((3,), 1 / 3, dtype=torch.float64))


def test_a_model_is_made_as_sure_as_others_agree_with_it() -> None:
    """Two classes; sure at temperature T to 1 / (1 + exp(-z / T))."""
    z = 1.0
    log_p = torch.tensor([[z, 0.0]]).expand(40, 2).log_softmax(1)
    others = [torch.cat([log_p[:36], log_p[:4].flip(1)])]  # nine of ten say the same
    agreed = answers_alike(log_p, others)
    assert float(agreed.mean()) == 0.9
    T = temperature(agreed.sum(), confidences(log_p)) ** 2
    assert 1 / (1 + math.exp(-z / T)) == pytest.approx(0.9, abs=0.03)


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


def states_of(answers: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.nn.functional.one_hot(torch.tensor(of), 3).double().mul(5).log_softmax(1) for name, of in answers.items()}


def test_how_far_from_theta_0_is_judged_by_what_the_ensemble_is_sure_of() -> None:
    """400 images, of half of which the ensemble is surer. Half-way gives up none of them, or each tenth, or many of the others.

    Predictions are mixed where it gives up each tenth of what all experts say; among many experts, where the mean does so, too;
    near theta_0, where the mean does so, and the merge goes the whole way.
    """
    surely, barely = states_of({"all": [0] * 200})["all"], states_of({"all": [0] * 200})["all"] / 5
    ensemble = torch.cat([surely, barely.log_softmax(1)])
    agree, differ = ensemble.expand(2, -1, -1), torch.stack([ensemble, ensemble.flip(1)])
    some = torch.stack([ensemble, torch.cat([ensemble[:180].flip(1), ensemble[180:]])])  # on the 20 that half-way keeps
    same, tenth, unsure, none = [0] * 400, [1] * 20 + [0] * 380, [0] * 200 + [1] * 100 + [0] * 100, [1] * 20 + [0] * 180 + [1] * 200
    method, bank, many = load_method("posterior"), a_bank(expert_states(2)), Bank.of(Net(), expert_states(11), expert_states(1)[0])
    start, *states = expert_states(3, spread=0.001)
    near = Bank.of(Net(), states, start)
    for one in (bank, near, many):
        one.kept["wise_ft"] = HALF_WAY.merge(one)
    assert _gone(near) < BASIN < _gone(bank)
    cases = ((same, same, 0.5), (same, tenth, 1.0), (same, unsure, 1.0), (unsure, unsure, 0.5), (tenth, tenth, 1.0),
             (tenth, same, 0.5), (none, none, 1.0))  # fmt: skip
    for mean, half, t in cases:
        said = {"ensemble": ensemble, **states_of({"mean": mean, "wise_ft": half})}
        assert method._judged(_answers(said, agree), bank) == (t, half in (tenth, none))  # type: ignore[attr-defined]
        assert method._judged(_answers(said, differ), bank) == (t, False)  # type: ignore[attr-defined]
        assert method._judged(_answers(said, agree), near) == (1, mean in (tenth, none))  # type: ignore[attr-defined]
        assert method._judged(_answers(said, differ), many) == (t, mean == half and half in (tenth, none))  # type: ignore[attr-defined]
        assert method._judged(_answers(said, some), bank) == (t, False)  # type: ignore[attr-defined]
        never = load_method("posterior", fallback="none")
        assert never._judged(_answers(said, agree), bank) == (t, False)  # type: ignore[attr-defined]
    for one, t in ((bank, 0.5), (near, 1.0)):
        assert method._judged(torch.zeros(200, 5), one) == (t, False)  # type: ignore[attr-defined]


def test_without_a_judge_the_mean_is_judged_alone() -> None:
    """Where nobody tells what half-way to theta_0 gives up: by the ensemble's surest answers that the mean gives up."""
    ensemble = states_of({"all": [0] * 400})["all"]
    bank, alone = a_bank(expert_states(2)), Bank.of(Net(), expert_states(2))
    for mean, apart in (([0] * 400, False), ([1] * 400, True)):
        said = {"ensemble": ensemble, **states_of({"mean": mean, "wise_ft": [1] * 400})}
        answers = _answers(said, ensemble.expand(2, -1, -1))
        for method, of in ((load_method("posterior", shrink="none"), bank), (load_method("posterior"), alone),
                           (load_method("posterior", shrink="half"), alone),
                           (load_method("posterior", panel=("ensemble", "mean")), bank)):  # fmt: skip
            assert method._judged(answers, of) == (1, apart)  # type: ignore[attr-defined]
        assert load_method("posterior", shrink="half")._judged(answers, bank) == (0.5, False)  # type: ignore[attr-defined]
    assert _answers(states_of({"mean": [0], "wise_ft": [1]}), ensemble[:1].expand(2, -1, -1)).sum() == 0


@pytest.mark.parametrize("others", [0, 1, 3])
def test_all_experts_agree_where_nobody_says_otherwise(others: int) -> None:
    """Of three, on two images; half-way gives the first another answer."""
    says = states_of({"ensemble": [0, 0], "other": [1, 1], "mean": [0, 0], "wise_ft": [2, 0]})
    log_p = torch.stack([says["other" if k < others else "ensemble"] for k in range(3)])
    assert _answers(says, log_p).sum(0).tolist() == [2, 0, 1, *([0, 0] if others else [2, 1])]


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(0, 99))
def test_answers_of_the_surest_half_are_those_of_a_sorted_list(N: int, seed: int) -> None:
    """Where no two images share a bin of confidence; half an image counts half."""
    rng = np.random.default_rng(seed)
    confidence = (100 + rng.choice(99, N, replace=False) + 0.5) / 200
    other = rng.integers(0, 2, N)
    log_p = torch.from_numpy(np.stack([confidence, 1 - confidence], 1)).log()
    found = of_the_surest(other_answers(log_p, [torch.nn.functional.one_hot(torch.from_numpy(other), 2).double()]))
    weights = np.clip(N / 2 - np.arange(N), 0, 1)
    np.testing.assert_allclose(found.numpy(), [N / 2, weights @ other[np.argsort(-confidence)]], atol=1e-9)


def test_a_merge_that_is_drawn_to_theta_0_keeps_the_heads_of_the_experts() -> None:
    """Coefficients of the encoder are halved beside theta_0's half; those of the head are not."""
    bank = a_bank(expert_states(2))
    for granularity in ("image", "batch"):
        with torch.no_grad():
            method = load_method("posterior", shrink="half", granularity=granularity)
            found = method.coefficients(Evidence(bank, a_batch()))  # type: ignore[attr-defined]
        at = bank.K + bank.anchors.index("theta_0")
        torch.testing.assert_close(found.encoder[..., :2], found.head[..., :2] / 2)
        assert (found.encoder[..., at] == 0.5).all()
        assert (found.head[..., 2:] == 0).all()


def test_one_sure_expert_of_many_does_not_get_all_shares() -> None:
    """Of 30 experts one is surer of each of 32 images, batch after batch. Without an image of each expert it has 0.97."""
    scores = torch.zeros(32, 30, dtype=torch.float64)
    scores[:, 7] = 1.0
    pi = torch.full((30,), 1 / 30)
    for _ in range(5):
        _, pi = site_shares(scores, pi)
    assert 1 / 30 < pi[7] < 0.4


@pytest.mark.parametrize(("granularity", "fallback"), [("image", "mixture"), ("batch", "mixture"), ("image", "none")])
def test_predictions_are_mixed_where_weights_cannot_be(granularity: str, fallback: str) -> None:
    """Experts whose predictions have nothing to do with those of the mean merge, and no theta_0."""
    N, bank = 60, Bank.of(Net(), expert_states(2))
    (row,) = rows_of([load_method("posterior", granularity=granularity, fallback=fallback)], bank).values()
    evidence = Evidence(bank, a_batch(N))
    logits = torch.randn(2, N, 3, generator=torch.Generator().manual_seed(0))
    evidence.recall({"none": logits})
    with torch.no_grad():
        done = predict(row, evidence, PerSample(bank))
    assert done.coefficients is not None
    assert done.coefficients.notes["mixed_predictions"] == [float(fallback == "mixture")]
    if fallback == "mixture":
        alpha = done.coefficients.encoder.expand(N, 2).numpy()
        expected = np.log(np.einsum("nk,knc->nc", alpha, logits.double().softmax(-1).numpy()))
        np.testing.assert_allclose(done.log_p.numpy(), expected, atol=1e-5)
        assert (done.forwards, done.merges, done.theta) == (0, 0, None)
        assert len(np.unique(alpha, axis=0)) == N  # also where weights would be merged once for the batch


def test_where_predictions_are_mixed_the_ensemble_tells_the_labels() -> None:
    """Experts agree on class 0 for nearly all images, and the mean merge, which is not what they are, says class 1."""
    N, bank = 60, Bank.of(Net(), expert_states(2))
    (row,) = rows_of([load_method("posterior", label_prior="batch")], bank).values()
    said = torch.tensor([[0.8, 0.1, 0.1]] * 55 + [[0.3, 0.4, 0.3]] * 5).log().expand(2, N, 3)
    evidence = Evidence(bank, a_batch(N))
    evidence.recall({"none": said})
    evidence.anchor_log_p = lambda name: torch.tensor([0.1, 0.8, 0.1]).log().expand(N, 3)  # type: ignore[method-assign,assignment]
    with torch.no_grad():
        done = predict(row, evidence, PerSample(bank))
    assert done.coefficients is not None and done.coefficients.notes["mixed_predictions"] == [1.0]
    assert row.state["b"].argmax() == 0
    assert bool((done.log_p.argmax(1) == 0).all())  # also the five that were unsure


def with_head(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: factor * tensor if name.startswith("head.") else tensor for name, tensor in state.items()}


def lengths_of_heads(states: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([torch.cat([state["head.weight"].flatten(), state["head.bias"]]).double().norm() for state in states])


@pytest.mark.parametrize("fields", [{}, {"granularity": "batch"}, {"shrink": "none"}, {"shrink": "half", "panel": ["wise_ft"]}])
@pytest.mark.parametrize("factor", [20.0, 1000.0])
def test_a_head_that_is_scaled_counts_as_one_of_the_others_length(fields: dict[str, Any], factor: float) -> None:
    states = expert_states(4)
    others = lengths_of_heads(states[1:]).quantile(0.5)
    by_hand = [with_head(states[0], float(others / lengths_of_heads(states[:1]))), *states[1:]]
    attacked = [with_head(states[0], factor), *states[1:]]
    method = load_method("posterior", **fields)
    expected = outcome(method, a_bank(by_hand), a_batch())
    for way in ("rows", "mixture"):
        bank = a_bank(attacked)
        with torch.no_grad():
            done = predict(rows_of([method], bank)["posterior"], Evidence(bank, a_batch()), PerSample(bank, way))
        torch.testing.assert_close(done.log_p.exp(), expected.to(done.log_p))
    with torch.no_grad():
        found = coefficients(method, Evidence(a_bank(attacked), a_batch()))  # type: ignore[arg-type]
    assert found.scale is not None
    np.testing.assert_allclose(found.scale, [float(factor * lengths_of_heads(states[:1]) / others), 1, 1, 1])
    assert found.notes["scale"] == found.scale.tolist()


def test_predictions_are_mixed_with_heads_of_one_scale() -> None:
    """Logits as of `test_predictions_are_mixed_where_weights_cannot_be`; those of a scaled head are as many times as large."""
    N, states = 60, expert_states(3)
    logits = torch.randn(3, N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    said = []
    for factor in (20.0, 1000.0):
        bank = Bank.of(Net(), [with_head(states[0], factor), *states[1:]], dtype=torch.float64)
        (row,) = rows_of([load_method("posterior")], bank).values()
        evidence = Evidence(bank, a_batch(N))
        evidence.recall({"none": torch.cat([factor * logits[:1], logits[1:]])})
        with torch.no_grad():
            done = predict(row, evidence, PerSample(bank))
        assert done.coefficients is not None and done.coefficients.notes["mixed_predictions"] == [1.0]
        said.append(done.log_p)
    torch.testing.assert_close(*said)


def test_heads_of_about_one_length_and_those_of_two_hospitals_are_left_as_they_are() -> None:
    states = expert_states(3)
    for some in ([with_head(states[0], 1.5), *states[1:]], [with_head(states[0], 20), states[1]]):
        with torch.no_grad():
            found = coefficients(load_method("posterior"), Evidence(a_bank(some), a_batch()))  # type: ignore[arg-type]
        assert found.scale is None and "scale" not in found.notes


@pytest.mark.parametrize("prior", ["batch", "stream"])
def test_a_row_remembers_the_labels_of_its_stream(prior: str) -> None:
    bank, batch = a_bank(expert_states(2)), a_batch(6)
    for name in ("posterior", "mean", "eam"):
        (row,) = rows_of([load_method(name, label_prior=prior)], bank).values()
        with torch.no_grad():
            for _ in range(2):
                predict(row, Evidence(bank, batch), PerSample(bank))
        labels = "labels" if name == "posterior" else "stream.labels"
        assert float(row.state[labels].sum()) == pytest.approx(12)
        (later,) = rows_of([row.method], bank).values()
        carry({row.method.key: later}, {row.method.key: row}, bank.names, bank)
        assert torch.equal(later.state[labels], row.state[labels])
