"""Adaptive methods, output mixtures and AdaMerging against hand-worked cases and float64 references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.special import betaln
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.curvature.fisher import diagonal
from fedmerge.merging.evidence import Answer, Evidence
from fedmerge.merging.methods._base import load_method
from fedmerge.merging.methods._expertise import scores, shares, with_offset
from fedmerge.merging.methods.oracle import grid
from fedmerge.merging.scoring.clustering import kmeans, mixture, nearest_center
from tests.banks import a_bank, a_batch, an_answer
from tests.conftest import Net, expert_states


class Said(Evidence):
    """Evidence with given probabilities of experts (K, N, C), and of the generalist (N, C)."""

    def __init__(self, p: list[list[list[float]]], g: list[list[float]] | None = None) -> None:
        super().__init__(a_bank(expert_states(len(p))), a_batch(len(p[0])))
        self.bank.temperatures = torch.ones(len(p), dtype=torch.float64)
        self.given = torch.tensor(p, dtype=torch.float64).clamp(min=1e-300).log()
        self.general = torch.tensor(g, dtype=torch.float64).clamp(min=1e-300).log() if g else None

    def view_logits(self, view: str) -> Tensor:
        return self.given

    def anchor_log_p(self, name: str) -> Tensor:
        assert self.general is not None
        return self.general


def nats(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def two_models(g: list[float], f: list[float], mode: str = "literal", delta: float = 0.5, tau: float = 0.05) -> float:
    """lambda' of Eq. 5-11, with floats."""
    middle = [(a + b) / 2 for a, b in zip(g, f, strict=True)]
    I = nats(middle) - (nats(g) + nats(f)) / 2  # noqa: E741
    level = {"literal": 1 / (1 + math.exp(-I)), "rescaled": I / math.log(2)}[mode]
    if nats(f) < tau:
        return min(level + delta, 1)
    return max(level - delta, 0) if nats(g) < tau else level


PAIRS = [([1, 0], [0, 1]), ([0.5, 0.5], [0.6, 0.4]), ([1, 0], [0.5, 0.5]), ([0.7, 0.3], [0.999, 0.001]), ([0.2, 0.8], [0.9, 0.1])]


@pytest.mark.parametrize("mode", ["literal", "rescaled"])
def test_t3_with_one_expert_is_the_paper(mode: str) -> None:
    said = Said([[f for _, f in PAIRS]], [g for g, _ in PAIRS])
    found = load_method("t3", generalist="theta_0", map=mode).coefficients(said).encoder
    wanted = torch.tensor([two_models(g, f, mode) for g, f in PAIRS], dtype=torch.float64)
    torch.testing.assert_close(found[:, 0], wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[:, 1], 1 - wanted, rtol=1e-9, atol=1e-12)  # theta_0's column
    assert float(found[0, 0]) == 1.0  # the docstring's example
    joint = load_method("t3", generalist="theta_0", map=mode, k_rule="joint").coefficients(said).encoder
    torch.testing.assert_close(joint, found, rtol=1e-9, atol=1e-12)  # K = 1 is the paper's in both rules


def test_t3_with_several_experts_is_the_mean_of_pairs() -> None:
    g = [[0.3, 0.7], [0.6, 0.4]]
    p = [[[0.8, 0.2], [0.5, 0.5]], [[0.1, 0.9], [0.99, 0.01]], [[0.4, 0.6], [0.2, 0.8]]]
    found = load_method("t3", generalist="theta_0").coefficients(Said(p, g)).encoder
    for i in range(2):
        wanted = [two_models(g[i], p[k][i]) / 3 for k in range(3)]
        torch.testing.assert_close(found[i, :3], torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    batch = load_method("t3_batch", generalist="theta_0").coefficients(Said(p, g)).encoder
    torch.testing.assert_close(batch, found.mean(0))
    folded = load_method("t3", generalist="mean").coefficients(Said(p, g)).encoder
    torch.testing.assert_close(folded, found[:, :3] + found[:, 3:4] / 3)


def test_t3_survives_probabilities_that_underflow_and_experts_that_break() -> None:
    g, p = [[[1.0, 0.0]], [[0.0, 1.0]]], [[1.0, 0.0]]
    assert torch.isfinite(load_method("t3", generalist="theta_0").coefficients(Said(g, p)).encoder).all()
    said = Said(g, p)
    said.given[1] = torch.nan
    for rule in ("pairwise_mean", "joint", "no_generalist"):
        found = load_method("t3", k_rule=rule).coefficients(said)
        assert found.encoder[0, 1] == 0
        torch.testing.assert_close(found.encoder.sum(1), torch.ones(1, dtype=torch.float64))
        assert found.notes == {"invalid": [1]}


def test_dawin_by_hand_and_its_bounds() -> None:
    third = [1 / 3] * 3
    said = Said([[[1.0, 0, 0]], [third]])  # H = (0, ln 3)
    found = load_method("dawin_sample").coefficients(said).encoder
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.25]], dtype=torch.float64))
    torch.testing.assert_close(
        load_method("doe").predict(said), torch.tensor([[0.75 + 0.25 / 3, 0.25 / 3, 0.25 / 3]], dtype=torch.float64)
    )


def test_the_offset_by_hand() -> None:
    seen = {"n": torch.tensor(2.0), "sum": torch.tensor([0.4, 1.6]), "squares": torch.tensor([0.08, 1.28])}  # no spread: O = 0
    score = torch.tensor([[0.5], [0.25]])
    torch.testing.assert_close(with_offset(score, seen), shares(score))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0.05, 2), st.floats(0.05, 2)), min_size=3, max_size=12))
def test_the_offset_is_the_printed_formula_and_a_mix_with_inverse_entropy(entropies: list[tuple[float, float]]) -> None:
    h = torch.tensor(entropies, dtype=torch.float64).T  # (2, N)
    seen = {"n": torch.tensor(float(h.shape[1]), dtype=torch.float64), "sum": h.sum(1), "squares": (h**2).sum(1)}
    found = with_offset(torch.exp(-h), seen)
    mean, std = h.mean(1), h.std(1)
    O, T = (std / mean).mean(), mean.sum() / mean[0]  # noqa: E741
    printed = (torch.exp(-h[1]) + O / T) / (torch.exp(-h).sum(0) + O)  # Eq. 2, for the second model
    torch.testing.assert_close(found[:, 1], printed, rtol=1e-7, atol=1e-9)
    S, eam = torch.exp(-h).sum(0)[:, None], (1 / mean) / (1 / mean).sum()
    torch.testing.assert_close(found, S / (S + O) * shares(torch.exp(-h)) + O / (S + O) * eam, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("experts", "clustering"), [(2, "auto"), (3, "auto"), (3, "dirichlet"), (3, "scope_mean")])
def test_clusters_are_few_and_keep_the_mean(experts: int, clustering: str) -> None:
    bank = a_bank(expert_states(experts, 1, spread=3.0))
    evidence = Evidence(bank, a_batch(40))
    each = load_method("dawin_sample").coefficients(evidence).encoder
    rows = load_method("dawin", clusters=3, clustering=clustering).coefficients(evidence).encoder
    assert len(rows.unique(dim=0)) <= (1 if clustering == "scope_mean" else 3)
    near = (rows - each).norm(dim=1).mean()
    far = (each.mean(0) - each).norm(dim=1).mean()
    assert near <= far + 1e-12
    if clustering in ("scope_mean",) or (experts == 3 and clustering == "auto"):
        torch.testing.assert_close(rows.mean(0), each.mean(0))


def test_scopes_of_dawin() -> None:
    bank = a_bank(expert_states(3, 1, spread=2.0))
    first, second = (Evidence(bank, a_batch(8, seed=seed)) for seed in (1, 2))
    prefix = load_method("dawin", scope="prefix", clustering="scope_mean")
    state, one = prefix.step({}, first)
    _, two = prefix.step(state, second)
    each = [load_method("dawin_sample").coefficients(evidence).encoder for evidence in (first, second)]
    torch.testing.assert_close(one.encoder[0], each[0].mean(0))
    torch.testing.assert_close(two.encoder[0], torch.cat(each).mean(0))
    full = load_method("dawin", scope="full", clustering="scope_mean")
    assert full.transductive
    state = full.survey(full.survey({}, first), second)
    _, here = full.step(state, first)
    torch.testing.assert_close(here.encoder[0], torch.cat(each).mean(0))


def test_forms_of_dawin() -> None:
    bank = a_bank(expert_states(3, 1))
    evidence = Evidence(bank, a_batch())
    rows = load_method("dawin_sample").coefficients(evidence).encoder
    for form, total in (("paper", 0.3), ("code", 0.9)):
        found = load_method("dawin_sample", form=form).coefficients(evidence).encoder
        torch.testing.assert_close(found[:, :3], total * rows)
        torch.testing.assert_close(found[:, 3], torch.full((6,), 1 - total, dtype=torch.float64))


def test_oracles_see_labels_and_nobody_else_does() -> None:
    said = Said([[[0.6, 0.4], [0.9, 0.1]], [[0.2, 0.8], [0.3, 0.7]]])
    with pytest.raises(PermissionError, match="sealed"):
        load_method("oracle").coefficients(said)
    with said.opened(Answer(torch.tensor([0, 1]), torch.zeros(2, dtype=torch.long))):
        found = load_method("oracle").coefficients(said).encoder
        torch.testing.assert_close(found, torch.tensor([[0.75, 0.25], [0.125, 0.875]], dtype=torch.float64))
        assert load_method("oracle", by="select").coefficients(said).encoder.tolist() == [[1, 0], [0, 1]]
        assert load_method("oracle", by="batch").coefficients(said).encoder.ndim == 1
    assert not load_method("oracle").ranked
    assert [len(grid(K, 0)) for K in (1, 2, 3, 4)] == [1, 21, 66, 261]
    torch.testing.assert_close(grid(4, 0).sum(1), torch.ones(261, dtype=torch.float64))


def test_the_oracle_of_a_domain_finds_the_best_point_of_its_grid() -> None:
    bank, method = a_bank(expert_states(2, 1, spread=2.0)), load_method("oracle", by="domain")
    evidence = Evidence(bank, a_batch(30))
    with evidence.opened(an_answer(30)):
        state = method.survey({}, evidence)
        _, found = method.step(state, evidence)
    answer = an_answer(30)
    for domain in (0, 1):
        here = answer.domains == domain
        hits = [
            float((bank.forward(bank.mix(w), evidence.batch, w).argmax(1) == answer.labels)[here].double().mean())
            for w in grid(2, 0)
        ]
        chosen = found.encoder[here][0]
        assert hits[round(float(chosen[0]) * 20)] == max(hits)


def test_adamerging_moves_against_a_finite_difference() -> None:
    bank, batch = a_bank(expert_states(3, 1)), a_batch()
    for level in ("task", "layer"):
        method = load_method("adamerging", level=level)
        c = method.start(bank)["c"] + 0.05 * torch.arange(3)[:, None]
        g = method.gradient_of(c, bank.tau, Evidence(bank, batch))

        def loss(c: Tensor, method: object = method) -> float:
            p = bank.forward(method.merged(c, bank.tau, bank), batch).softmax(-1)
            return float(-(p * p.log()).sum(1).mean())

        for index in [(0, 0), (2, c.shape[1] - 1)]:
            step = torch.zeros_like(c)
            step[index] = 1e-6
            assert float(g[index]) == pytest.approx((loss(c + step) - loss(c - step)) / 2e-6, rel=1e-5, abs=1e-10)


def test_adamerging_is_adam_on_clamped_coefficients() -> None:
    bank, batch = a_bank(expert_states(2, 1)), a_batch()
    method = load_method("adamerging", steps=3, lr=0.4)
    state, theta = method.step(method.start(bank), Evidence(bank, batch))
    c = torch.full((2, 1), 0.3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([c], lr=0.4)
    for _ in range(3):
        adam.zero_grad()
        merged = bank.base + (c.clamp(0, 1) * bank.tau).sum(0)
        p = bank.forward(merged, batch).log_softmax(-1)
        (-(p.exp() * p).sum(1).mean()).backward()
        adam.step()
    torch.testing.assert_close(state["c"], c.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(theta, (bank.base + (c.clamp(0, 1) * bank.tau).sum(0)).detach(), rtol=1e-9, atol=1e-12)
    evidence = Evidence(bank, batch)
    with evidence.billed() as bill:
        method.step(method.start(bank), evidence)
    assert bill.forwards == 9  # a forward and a backward (two) for each step


@pytest.mark.parametrize("estimator", ["exact", "fb_compat"])
def test_fisher_information_by_loops(estimator: str) -> None:
    bank, x = a_bank(expert_states(1, 1)), a_batch(5)
    forward, theta = bank.forward_of(0), bank.theta[0]
    found = diagonal(forward, theta, x, estimator)  # type: ignore[arg-type]
    wanted = torch.zeros_like(theta)
    if estimator == "exact":
        for image in x:
            for c in range(3):
                leaf = theta.clone().requires_grad_()
                log_p = forward(leaf, image[None]).log_softmax(-1)[0, c]
                wanted += log_p.exp().detach() * torch.autograd.grad(log_p, leaf)[0] ** 2 / 5
    else:
        gradient = torch.zeros_like(theta)  # of the sum over images and classes, squared as a whole
        for image in x:
            for c in range(3):
                leaf = theta.clone().requires_grad_()
                log_p = forward(leaf, image[None]).log_softmax(-1)[0, c]
                gradient += torch.autograd.grad(log_p.exp().sqrt().detach() * log_p, leaf)[0]
        wanted += gradient**2 / 5
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-14)


def test_the_square_of_fusionbench_is_of_the_sum_over_classes() -> None:
    """Two classes alike: the gradients of both cancel out, (1/2 - 1/2)^2, where each squared by itself gives 1/4."""
    both = diagonal(lambda t, x: t.expand(len(x), 2) * 1.0, torch.zeros(2), torch.zeros(1, 1), "fb_compat")
    assert both.tolist() == [0, 0]
    assert diagonal(lambda t, x: t.expand(len(x), 2) * 1.0, torch.zeros(2), torch.zeros(1, 1)).tolist() == [0.25, 0.25]


def test_losses_under_pseudo_labels_have_no_temperature() -> None:
    bank, batch = a_bank(expert_states(2, 1)), a_batch(4)
    for name in ("pseudo_ensemble_soft", "pseudo_ensemble_hard", "pseudo_merged_soft", "pseudo_merged_hard"):
        evidence = Evidence(bank, batch)
        found = scores(name, evidence, True, 0)  # type: ignore[arg-type]
        log_p = bank.expert_logits(batch).log_softmax(-1)
        mean = bank.forward(bank.mix(torch.tensor([0.5, 0.5])), batch).softmax(-1)
        target = mean if "merged" in name else log_p.exp().mean(0)
        if name.endswith("hard"):
            target = torch.nn.functional.one_hot(target.argmax(-1), 3).double()
        torch.testing.assert_close(found, (target * log_p).sum(-1).exp(), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(scores("entropy", evidence, True, 0), scores("entropy", evidence, False, 0))


def reference_mixture(x: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Oh et al.'s loop: E, M, and only then the look at the likelihood. x: (N,). Means and members of one start."""
    eps, before = 10 * np.finfo(float).eps, -np.inf
    g = np.eye(member.max() + 1)[member]

    def maximize(g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        count = g.sum(0) + eps
        m = g.T @ x / count
        v = np.minimum(g.T @ x**2 / count - m**2, m * (1 - m) / 4) + eps
        s = m * (1 - m) / (v + 1e-10) - 1
        return count / count.sum(), m, s * m, s * (1 - m)

    def posterior(pi: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.log(pi) + (a - 1) * np.log(x)[:, None] + (b - 1) * np.log(1 - x)[:, None] - betaln(a, b)

    pi, m, a, b = maximize(g)
    for _ in range(1000):
        log_g = posterior(pi, a, b)
        norm = np.logaddexp.reduce(log_g, 1)
        pi, m, a, b = maximize(np.exp(log_g - norm[:, None]))
        likelihood, last = float(norm.mean()), before
        before = likelihood
        if abs(likelihood - last) < 1e-4:
            break
    return m, posterior(pi, a, b).argmax(1), before


def test_the_beta_mixture_ends_with_the_step_of_the_source() -> None:
    rng = np.random.default_rng(5)
    x = np.clip(np.concatenate([rng.beta(12, 40, 200), rng.beta(30, 14, 150), rng.beta(60, 6, 90)]), 1e-6, 1 - 1e-6)
    rows = torch.tensor(np.stack([1 - x, x], 1))
    found = mixture(rows, 3, 1)
    starts = [kmeans(rows, 3, 1 + r, restarts=1).member.numpy() for r in range(3)]
    m, member, _ = max((reference_mixture(x, start) for start in starts), key=lambda run: run[2])
    np.testing.assert_allclose(found.centers[:, 1].numpy(), m, rtol=1e-6)
    assert found.member.tolist() == member.tolist()


def test_fisher_at_the_target_learns_from_the_first_images_alone() -> None:
    bank = a_bank(expert_states(2, 1))
    (row,) = load_method("fisher", mode="target", samples=8).expand(bank.names)
    assert row.key == "fisher"
    assert row.gradient
    state, _ = row.step(row.start(bank), Evidence(bank, a_batch(6, seed=1)))
    state, theta = row.step(state, Evidence(bank, a_batch(6, seed=2)))
    _, later = row.step(state, Evidence(bank, a_batch(6, seed=3)))
    seen = torch.cat([a_batch(6, seed=1), a_batch(6, seed=2)[:2]])
    F = torch.stack([diagonal(bank.forward_of(k), bank.theta[k], seen) for k in range(2)])
    torch.testing.assert_close(state["F"], F, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(theta, load_method("fisher").weighted(bank, F))
    assert torch.equal(theta, later)


def test_values_out_of_range_are_refused() -> None:
    for name, wrong in (("ties", {"keep": 1.5}), ("dare", {"drop": 1.0}), ("eam", {"temperature": 0}), ("t3", {"delta": -1})):
        with pytest.raises(ValidationError):
            load_method(name, **wrong)
    with pytest.raises(ValidationError, match="the merge is the mean"):
        load_method("regmean_pp", mode="target")


def test_constant_logits_and_entropies_of_zero() -> None:
    flat = Said([[[0.5, 0.5]] * 4] * 3, [[0.5, 0.5]] * 4)
    sure = Said([[[1.0, 0.0]] * 4] * 3, [[1.0, 0.0]] * 4)
    for said in (flat, sure):
        for name in ("eam", "t3", "t3_batch", "dawin", "dawin_sample"):
            c = load_method(name).coefficients(said).encoder
            torch.testing.assert_close(c, torch.full_like(c, 1 / 3), msg=name)


def test_one_bank_of_one_expert_returns_it() -> None:
    bank = Bank.of(Net(), expert_states(1), dtype=torch.float64)
    for name in ("eam", "t3", "t3_batch", "dawin"):
        c = load_method(name).coefficients(Evidence(bank, a_batch(1))).encoder
        torch.testing.assert_close(c, torch.ones_like(c))


def test_the_offset_of_a_broken_expert_is_that_of_the_others_alone() -> None:
    states, batch = expert_states(3, 1, spread=2.0), a_batch(8)
    whole, others = a_bank(states), a_bank(states, order=[0, 2])
    whole.rows[1] = torch.nan
    found = load_method("doe", offset=True).predict(Evidence(whole, batch))
    torch.testing.assert_close(found, load_method("doe", offset=True).predict(Evidence(others, batch)))
    rows = load_method("dawin_sample", offset=True).coefficients(Evidence(whole, batch)).encoder
    torch.testing.assert_close(
        rows[:, [0, 2]], load_method("dawin_sample", offset=True).coefficients(Evidence(others, batch)).encoder
    )


def test_experts_together_are_those_that_say_numbers() -> None:
    """`joint`: one divergence of the generalist and of who is valid."""
    g, p = [[0.97, 0.03], [0.1, 0.9]], [[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5]] * 2, [[0.3, 0.7], [0.6, 0.4]]]
    whole, others = Said(p, g), Said([p[0], p[2]], g)
    whole.given[1] = torch.nan
    for signal in ("mutual_information", "entropy_ratio"):
        method = load_method("t3", k_rule="joint", generalist="theta_0", signal=signal, tau_f=0.2, map="rescaled")
        found, wanted = (method.coefficients(said).encoder for said in (whole, others))
        torch.testing.assert_close(found[:, [0, 2, 3]], wanted[:, :3])


@pytest.mark.parametrize("by", ["select", "batch", "stream", "domain"])
def test_an_oracle_takes_no_expert_for_right_that_says_no_numbers(by: str) -> None:
    """All labels are 0, which is where NaN seems to be largest."""
    bank = a_bank(expert_states(3, 1))
    bank.rows[1] = torch.nan
    method, evidence = load_method("oracle", by=by), Evidence(bank, a_batch(6))
    with torch.no_grad(), evidence.opened(Answer(torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64))):
        assert (method.coefficients(evidence).encoder[..., 1] == 0).all()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("adamerging", {}),
        ("adamerging", {"level": "layer"}),
        ("fisher", {"mode": "target"}),
        ("fisher", {"mode": "target", "estimator": "mc"}),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_image_of_no_numbers_does_not_spoil_the_stream(name: str, fields: dict[str, str], value: float) -> None:
    """What is learned from a batch is learned from its other images."""
    bank = a_bank(expert_states(3, 1))
    (method,) = load_method(name, **fields).expand(bank.names)
    whole, others = a_batch(6), a_batch(6)[[0, 1, 3, 4, 5]]
    whole[2] = value
    for batch in (whole[2:3], whole):
        found, _ = method.step(method.start(bank), Evidence(bank, batch))
        wanted, _ = method.step(method.start(bank), Evidence(bank, others)) if len(batch) > 1 else (method.start(bank), None)
        assert found.keys() == wanted.keys()
        for key in found:
            torch.testing.assert_close(found[key], wanted[key])


@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize("apart", [1e-7, 1e-9, 1e-12, 1e-15])
@pytest.mark.parametrize("find", [kmeans, mixture])
def test_rows_that_are_nearly_equal_are_clustered(find: object, apart: float, experts: int) -> None:
    """As where all experts are sure of all images: a batch of 32, and of 80."""
    for N in (32, 80):
        drawn = torch.rand(N, experts, generator=torch.Generator().manual_seed(N), dtype=torch.float64)
        rows = (1 / experts + apart * drawn) / (1 + apart * drawn.sum(1, keepdim=True))
        found = find(rows, 3, seed=1)  # type: ignore[operator]
        assert float((found.rows - rows).abs().max()) <= 2 * apart + 1e-15
        assert torch.equal(nearest_center(rows, rows[:20])[:20], torch.arange(20)) or apart < 1e-12
