"""Static methods against references written differently: loops over dictionaries of numpy arrays, float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedmerge.errors import CheckpointError
from fedmerge.federated.statistics._base import STATISTICS
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.functional import Adapter, merge
from fedmerge.merging.methods._base import load_method
from fedmerge.merging.methods.slerp import karcher, slerp
from fedmerge.merging.methods.ties import disjoint_merge, trim
from tests.banks import COUNTS, a_bank, a_batch, statistics
from tests.conftest import Net, expert_states

Arrays = dict[str, NDArray[np.float64]]
NAMES = [name for name, _ in Net().named_parameters()]
STATES = expert_states(3, 1)
BASE = {name: tensor.double().numpy() for name, tensor in expert_states(1, 99)[0].items()}
EXPERTS = [{name: state[name].double().numpy() for name in NAMES} for state in STATES]
TAU = [{name: expert[name] - BASE[name] for name in NAMES} for expert in EXPERTS]


def merged(name: str, **given: object) -> Arrays:
    bank = a_bank(STATES)
    state = bank.state_dict(load_method(name, **given).merge(bank))
    return {name: state[name].numpy() for name in NAMES}


def alike(found: Arrays, wanted: Callable[[str], NDArray[np.float64]], rtol: float = 1e-12) -> bool:
    return all(np.allclose(found[name], wanted(name), rtol=rtol, atol=1e-13) for name in NAMES)


def mean(name: str) -> NDArray[np.float64]:
    return sum(expert[name] for expert in EXPERTS) / 3


def test_task_arithmetic_and_wise_ft() -> None:
    assert alike(merged("task_arithmetic", scale=0.3), lambda n: BASE[n] + 0.3 * (TAU[0][n] + TAU[1][n] + TAU[2][n]))
    assert alike(merged("task_arithmetic", scale=0.3), lambda n: 0.1 * BASE[n] + 0.9 * mean(n))
    assert alike(merged("task_arithmetic", scale=1 / 3), mean)
    assert alike(merged("wise_ft", a=0.4), lambda n: 0.6 * BASE[n] + 0.4 * mean(n))
    assert alike(merged("wise_ft", a=0.4), lambda n: merged("task_arithmetic", scale=0.4 / 3)[n])


def test_wise_ft_moves_batch_norm_statistics_as_weights() -> None:
    base = expert_states(1, 99)[0] | {"norm.num_batches_tracked": torch.tensor(41)}
    base["norm.bias"] = torch.tensor([-0.0, 0.0, 1.0, -1.0])
    for a in (0.0, 0.3, 1.0):
        found = merge(Net(), STATES, "wise_ft", base, a=a)
        for name, tensor in base.items():
            mean_of_all = np.mean([state[name].double().numpy() for state in STATES], 0)
            wanted = (1 - a) * tensor.double().numpy() + a * mean_of_all
            if tensor.is_floating_point():
                np.testing.assert_allclose(found[name].numpy(), wanted, rtol=1e-5, atol=1e-6)
        if a == 0:
            assert all(torch.equal(found[name].view(torch.uint8), t.view(torch.uint8)) for name, t in base.items() if t.ndim)
            assert found["norm.num_batches_tracked"] == 41
    adapt, x, model = Adapter(Net(), STATES, "wise_ft", base, a=0.0), a_batch(dtype=torch.float32), Net().eval()
    model.load_state_dict(base)
    assert torch.equal(adapt(x), model(x).log_softmax(-1))


def ties(keep: float, combine: str) -> Arrays:
    flat = [np.concatenate([tau[name].ravel() for name in NAMES]) for tau in TAU]
    d = len(flat[0])
    kept = []
    for tau in flat:
        order = sorted(range(d), key=lambda i: abs(tau[i]))
        threshold = abs(tau[order[max(1, d - int(keep * d)) - 1]])
        kept.append([x if abs(x) >= threshold else 0.0 for x in tau])
    signs = [np.sign(sum(tau[i] for tau in kept)) for i in range(d)]
    majority = np.sign(sum(signs))
    result = []
    for i in range(d):
        sign = signs[i] or majority
        agreeing = [tau[i] for tau in kept if tau[i] != 0 and np.sign(tau[i]) == sign]
        result.append(sum(agreeing) / (len(agreeing) or 1) if combine == "mean" else sum(agreeing))
    out, at = {}, 0
    for name in NAMES:
        size = TAU[0][name].size
        out[name] = BASE[name] + 0.3 * np.array(result[at : at + size]).reshape(TAU[0][name].shape)
        at += size
    return out


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.55, 1.0])
def test_ties(keep: float, combine: str) -> None:
    wanted = ties(keep, combine)
    assert alike(merged("ties", keep=keep, combine=combine), lambda n: wanted[n])


def ties_in_one_piece(bank: Bank, keep: float, combine: str) -> torch.Tensor:
    """All task vectors at once, thresholds by sorting."""
    tau = bank.tau
    rank = max(1, bank.P - int(keep * bank.P))
    kept = torch.where(tau.abs() >= tau.abs().sort(1).values[:, rank - 1 : rank], tau, 0)
    gamma = kept.sum(0).sign()
    gamma = torch.where(gamma == 0, gamma.sum().sign(), gamma)
    same = (kept.sign() == gamma) & (kept != 0)
    total = (kept * same).sum(0)
    return bank.base + 0.3 * (total / same.sum(0).clamp(min=1) if combine == "mean" else total)


@pytest.mark.parametrize(
    ("kind", "combine"),
    [("normal", "sum"), ("few values", "mean"), ("mostly zero", "mean"), ("sorted", "mean"), ("opposite", "mean")],
)
def test_ties_in_blocks_has_the_bits_of_ties_in_one_piece(kind: str, combine: str) -> None:
    generator, wide = torch.Generator().manual_seed(4), 1_100_003  # more than the sample, and no multiple of a block
    tau = torch.randn(7 if kind == "normal" else 3, wide, generator=generator)  # from five on, torch sums in another order
    match kind:
        case "few values":
            tau = (2 * tau).round() / 4
        case "mostly zero":
            tau *= torch.rand(tau.shape, generator=generator) < 0.1
        case "sorted":
            tau = tau.sort(1).values
        case "opposite":
            tau[1] = -tau[0]
    model = torch.nn.Sequential(torch.nn.Linear(wide, 1, bias=False))
    bank = Bank.of(model, [{"0.weight": row[None]} for row in tau], {"0.weight": torch.zeros(1, wide)})
    assert torch.equal(load_method("ties", combine=combine).merge(bank), ties_in_one_piece(bank, 0.2, combine))


def test_ties_by_hand() -> None:
    tau = torch.tensor([[4.0, -1.0], [2.0, 3.0]])
    assert disjoint_merge(tau, "mean").tolist() == [3.0, 3.0]
    assert disjoint_merge(tau, "sum").tolist() == [6.0, 3.0]
    assert trim(torch.arange(1.0, 11), 0.2).tolist() == [0, 0, 0, 0, 0, 0, 0, 8, 9, 10]  # int(0.2 d) + 1 stay
    assert disjoint_merge(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), "mean").tolist() == [
        1.0,
        1.0,
    ]  # a zero sign takes the majority's


def test_ties_that_keeps_all_of_one_sign_is_the_mean_of_task_vectors() -> None:
    states = [
        {n: t + k * (t.abs() + 1) if t.is_floating_point() else t for n, t in expert_states(1, 99)[0].items()} for k in (1, 2)
    ]
    bank = a_bank(states)
    found = load_method("ties", keep=1.0, scale=1.0).merge(bank)
    torch.testing.assert_close(found, bank.theta.mean(0), rtol=1e-12, atol=1e-12)


def test_dare_drops_rescales_and_keeps_what_it_expects() -> None:
    bank = a_bank(STATES)
    none_dropped = load_method("dare", drop=0.0).merge(bank)
    torch.testing.assert_close(none_dropped, load_method("task_arithmetic").merge(bank))
    one = Bank.of(Net(), STATES[:1], expert_states(1, 99)[0], dtype=torch.float64)
    ratios = (load_method("dare", scale=1.0, seed=4).merge(one) - one.base) / one.tau[0]
    assert set(ratios.round(decimals=9).tolist()) <= {0.0, -0.0, 2.0}
    draws = torch.stack([load_method("dare", scale=1.0, seed=seed).merge(one) for seed in range(2000)])
    spread = one.tau[0].abs()  # the standard deviation of one draw
    assert bool(((draws.mean(0) - one.theta[0]).abs() < 5 * spread / math.sqrt(2000)).all())


def test_slerp_between_orthogonal_parallel_and_opposite_vectors() -> None:
    e = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(slerp(e[0], e[1], 0.5), (e[0] + e[1]) / math.sqrt(2))
    torch.testing.assert_close(slerp(e[0], e[1], 1 / 3), math.cos(math.pi / 6) * e[0] + math.sin(math.pi / 6) * e[1])
    torch.testing.assert_close(slerp(2 * e[0], 4 * e[0], 0.25), 2.5 * e[0])
    torch.testing.assert_close(slerp(e[0], -e[0], 0.5), 0 * e[0])
    assert slerp(0 * e[0], e[1], 0.5).tolist() == [0, 0.5, 0]


def test_slerp_of_two_experts_tensor_by_tensor() -> None:
    bank = a_bank(STATES[:2])
    found = bank.state_dict(load_method("slerp", t=0.3).merge(bank))
    for name in NAMES:
        a, b = EXPERTS[0][name].ravel(), EXPERTS[1][name].ravel()
        cos = a @ b / math.sqrt((a @ a) * (b @ b))
        w = math.acos(cos)
        wanted = 0.7 * a + 0.3 * b if cos > 0.9995 else (math.sin(0.7 * w) * a + math.sin(0.3 * w) * b) / math.sin(w)
        np.testing.assert_allclose(found[name].numpy().ravel(), wanted, rtol=1e-10)


def test_the_karcher_mean_is_where_angles_cancel() -> None:
    e = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(karcher(e, 10, 1e-12), torch.full((3,), 1 / math.sqrt(3), dtype=torch.float64))
    v = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = karcher(v, 500, 1e-13)
    torch.testing.assert_close(u.norm(), v.norm(dim=1).mean())
    u, units = u / u.norm(), v / v.norm(dim=1, keepdim=True)
    pull = sum(math.acos(float(x @ u)) / math.sin(math.acos(float(x @ u))) * (x - (x @ u) * u) for x in units)
    assert float(pull.norm()) < 1e-10
    two = karcher(torch.stack([3 * e[0], e[1]]), 100, 1e-13)
    torch.testing.assert_close(two, (e[0] + e[1]) * math.sqrt(2))  # between them, at the mean length of 2


def test_model_stock() -> None:
    def wanted(name: str) -> NDArray[np.float64]:
        flat = [tau[name].ravel() for tau in TAU]
        cos = [a @ b / math.sqrt((a @ a) * (b @ b)) for i, a in enumerate(flat) for b in flat[i + 1 :]]
        c = max(sum(cos) / 3, 0)
        t = 3 * c / (1 + 2 * c)
        return t * mean(name) + (1 - t) * BASE[name]

    assert alike(merged("model_stock"), wanted)
    base = expert_states(1, 99)[0]
    same = [{n: t + s * (1 + t.abs()) if t.is_floating_point() else t for n, t in base.items()} for s in (1, 2)]
    bank = a_bank(same)
    torch.testing.assert_close(load_method("model_stock").merge(bank), bank.theta.mean(0))  # cosine 1
    opposite = [{n: t + s * (1 + t.abs()) if t.is_floating_point() else t for n, t in base.items()} for s in (0.1, -0.1)]
    bank = a_bank([{n: t.abs() if "running_var" in n else t for n, t in state.items()} for state in opposite])
    torch.testing.assert_close(load_method("model_stock").merge(bank), bank.base)  # cosine -1 counts as 0


@pytest.mark.parametrize("average", ["cosine", "angle"])
def test_unrelated_task_vectors_draw_model_stock_to_the_start(average: str) -> None:
    model, ratios = torch.nn.Sequential(torch.nn.Linear(96, 1, bias=False)), []
    for seed in range(40):
        tau = torch.randn(8, 96, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        bank = Bank.of(model, [{"0.weight": row[None]} for row in tau], {"0.weight": torch.zeros(1, 96)}, dtype=torch.float64)
        found = load_method("model_stock", average=average).merge(bank)
        cos = [float(a @ b / (a.norm() * b.norm())) for i, a in enumerate(tau) for b in tau[i + 1 :]]
        c = max(sum(cos) / 28 if average == "cosine" else math.cos(sum(map(math.acos, cos)) / 28), 0)
        torch.testing.assert_close(found, 8 * c / (1 + 7 * c) * tau.mean(0), rtol=1e-10, atol=1e-12)
        ratios.append(8 * c / (1 + 7 * c))
    assert sum(ratios) / 40 < 0.08  # clamping every pair by itself gives 0.25


@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0])
def test_float32_rules_of_inner_products_are_those_of_float64(spread: float) -> None:
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(64, 3000, generator=generator)
    states = [{"0.weight": start + spread * torch.randn(64, 3000, generator=generator)} for _ in range(5)]
    model, base = torch.nn.Sequential(torch.nn.Linear(3000, 64, bias=False)), {"0.weight": start}
    for method in (load_method("slerp"), load_method("slerp", of="tau"), load_method("model_stock")):
        found = method.merge(Bank.of(model, states, base))
        wanted = method.merge(Bank.of(model, states, base, dtype=torch.float64))
        assert float((found - wanted).norm() / wanted.norm()) < 1e-7
    v = torch.stack([state["0.weight"].double().reshape(-1) for state in states])
    u, units = v.mean(0) / v.mean(0).norm(), v / v.norm(dim=1, keepdim=True)
    for _ in range(10):  # on the sphere itself, vector by vector
        T = torch.stack([(x - (x @ u) * u) * (math.acos(x @ u) / math.sin(math.acos(x @ u))) for x in units]).mean(0)
        u = torch.cos(T.norm()) * u + torch.sin(T.norm()) * T / T.norm()
    wanted = v.norm(dim=1).mean() * u
    found = load_method("slerp", tolerance=1e-9).merge(Bank.of(model, states)).double()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-7


def test_model_stock_by_rows_of_a_matrix() -> None:
    found = merged("model_stock", filter_wise=True)["head.weight"]
    for row in range(3):
        flat = [tau["head.weight"][row] for tau in TAU]
        cos = [a @ b / math.sqrt((a @ a) * (b @ b)) for i, a in enumerate(flat) for b in flat[i + 1 :]]
        t = max(sum(cos), 0) / (1 + 2 * max(sum(cos), 0) / 3)
        wanted = t * mean("head.weight")[row] + (1 - t) * BASE["head.weight"][row]
        np.testing.assert_allclose(found[row], wanted, rtol=1e-12)


def test_mixup_is_a_draw_on_the_simplex_and_depends_on_the_seed_alone() -> None:
    bank = a_bank(STATES)
    weights = torch.stack([load_method("mixup", seed=seed).statistics(bank) for seed in range(3000)])
    torch.testing.assert_close(weights.sum(1), torch.ones(3000, dtype=torch.float64))
    torch.testing.assert_close(weights.mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.03, rtol=0)
    assert abs(float(weights.var()) - (1 / 3 * 2 / 3) / 2.5) < 0.01  # Dir(a 1_K): m (1 - m) / (K a + 1)
    w = load_method("mixup", seed=7).statistics(bank).numpy()
    assert alike(merged("mixup", seed=7), lambda n: sum(w[k] * EXPERTS[k][n] for k in range(3)))
    assert [one.key for one in load_method("mixup", draws=2).expand(bank.names)] == ["mixup:0", "mixup:1"]


def test_fisher_merging() -> None:
    F = [{n: t.numpy() for n, t in one.items()} for one in statistics([0, 1, 2], STATES)["fisher"]]
    norms = [math.sqrt(sum(float((f[n] ** 2).sum()) for n in NAMES)) for f in F]
    c = [1 / (norm + 1e-6) for norm in norms]
    assert alike(
        merged("fisher"),
        lambda n: sum(c[k] * (F[k][n] + 1e-6) * EXPERTS[k][n] for k in range(3)) / sum(c[k] * (F[k][n] + 1e-6) for k in range(3)),
    )
    bank = a_bank(STATES)
    equal = load_method("fisher").weighted(bank, torch.rand(bank.P, dtype=torch.float64).expand(3, -1))
    torch.testing.assert_close(equal, bank.theta.mean(0))


def test_fisher_by_hand() -> None:
    bank = a_bank(expert_states(2))
    bank.theta[0], bank.theta[1] = 0.0, 4.0
    F = torch.stack([torch.full((bank.P,), 3.0), torch.full((bank.P,), 1.0)])
    assert torch.allclose(load_method("fisher", normalize=False).weighted(bank, F), torch.tensor(1.0).double(), atol=1e-5)


def test_regmean() -> None:
    for name, ratio in (("regmean", 1.0), ("regmean", 0.8), ("regmean_pp", 1.0)):
        G = [one["head.weight"].numpy() for one in statistics([0, 1, 2], STATES)["gram"]]
        G = [ratio * g + (1 - ratio) * np.diag(np.diag(g)) for g in G]
        wanted = (np.linalg.inv(sum(G)) @ sum(g @ expert["head.weight"].T for g, expert in zip(G, EXPERTS, strict=True))).T
        found = merged(name, ratio=ratio, ridge=1e-14)
        np.testing.assert_allclose(found["head.weight"], wanted, rtol=1e-6)  # Gram matrices travel as float32
        for other in set(NAMES) - {"head.weight"}:
            np.testing.assert_allclose(found[other], mean(other), rtol=1e-12)


def test_regmean_changes_the_outputs_on_every_sites_inputs_least() -> None:
    """The least-squares problem itself: no small step lowers the sum of squared changes."""
    X = [torch.randn(40, 4, generator=torch.Generator().manual_seed(200 + k), dtype=torch.float64) for k in range(3)]
    W = [torch.tensor(expert["head.weight"]) for expert in EXPERTS]
    bank = Bank.of(Net(), STATES, dtype=torch.float64, statistics={"gram": [{"head.weight": x.T @ x / 40} for x in X]})
    found = bank.state_dict(load_method("regmean", ratio=1.0, ridge=1e-14).merge(bank))["head.weight"]

    def change(V: torch.Tensor) -> float:
        return float(sum(((x @ V.T - x @ w.T) ** 2).sum() for x, w in zip(X, W, strict=True)))

    for seed in range(20):
        step = 1e-3 * torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert change(found + step) > change(found)


def test_a_head_whose_inputs_hardly_vary_stays_of_the_experts_size() -> None:
    """Features of a trained encoder lie near a plane; there a ratio of 1 blows the head up."""
    generator, d = torch.Generator().manual_seed(1), 24
    W = [0.05 * torch.randn(3, d, generator=generator, dtype=torch.float64) for _ in range(3)]
    model = torch.nn.Sequential(torch.nn.Linear(d, 3, bias=False))
    span = torch.randn(3, 4, d, generator=generator, dtype=torch.float64)
    X = [torch.randn(300, 4, generator=generator, dtype=torch.float64) @ s for s in span]
    X = [x + 0.003 * torch.randn(300, d, generator=generator, dtype=torch.float64) for x in X]
    for name, kind in (("regmean", "gram"), ("regmean_pp", "gram_rounds")):
        given = {kind: [{"0.weight": x.T @ x / 300} for x in X]}
        bank = Bank.of(model, [{"0.weight": w} for w in W], dtype=torch.float64, statistics=given)
        G = torch.stack([one["0.weight"] for one in given[kind]])
        G = 0.95 * G + 0.05 * torch.diag_embed(G.diagonal(dim1=1, dim2=2))
        wanted = torch.linalg.solve(G.sum(0), sum(g @ w.T for g, w in zip(G, W, strict=True))).T
        found, raw = (load_method(name, **given).merge(bank).view(3, d) for given in ({}, {"ratio": 1.0}))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert found.abs().max() < max(w.abs().max() for w in W) < 2 * raw.abs().max()
    assert STATISTICS.load("gram_rounds")().ratio == load_method("regmean_pp").ratio == 0.95


def test_diwa_is_the_mean_of_soups() -> None:
    soups = expert_states(3, 5)  # not the experts themselves
    bank = Bank.of(Net(), STATES, statistics={"soup": soups}, counts=COUNTS[:3], dtype=torch.float64)
    state = bank.state_dict(load_method("diwa").merge(bank))
    found = {name: state[name].numpy() for name in NAMES}
    assert alike(found, lambda n: sum(soup[n].double().numpy() for soup in soups) / 3)
    assert not alike(found, mean, rtol=1e-3)


def test_heads_of_their_own_are_averaged_by_rules_about_theta_0() -> None:
    bank = a_bank(STATES)
    bank.shared_head = False
    for name in ("task_arithmetic", "ties", "model_stock", "wise_ft"):
        torch.testing.assert_close(load_method(name).merge(bank)[bank.head], bank.theta[:, bank.head].mean(0))
    bank.shared_head = True
    assert not torch.allclose(load_method("ties").merge(bank)[bank.head], bank.theta[:, bank.head].mean(0))
    torch.testing.assert_close(load_method("ties", head_policy="mean").merge(bank)[bank.head], bank.theta[:, bank.head].mean(0))


@pytest.mark.parametrize("name", ["fisher", "regmean", "regmean_pp", "diwa"])
def test_a_statistic_that_no_site_uploaded_says_what_to_add(name: str) -> None:
    bank = Bank.of(Net(), STATES, expert_states(1, 99)[0], counts=COUNTS[:3])
    with pytest.raises(CheckpointError, match=r"add '\w+' to the scenario's uploads"):
        load_method(name).merge(bank)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare", "wise_ft", "model_stock"])
def test_a_bank_without_theta_0_says_so(name: str) -> None:
    with pytest.raises(CheckpointError, match="base=theta_0"):
        load_method(name).merge(Bank.of(Net(), STATES))


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_of_many_is_that_of_all_pairs(filter_wise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the sum of unit vectors; also where some experts have not moved, and where two are one."""
    states = expert_states(6, 3)
    states[2] = states[4]
    states[5] = base = expert_states(1, 99)[0]
    bank = Bank.of(Net(), states, base, dtype=torch.float64)
    wanted = load_method("model_stock", filter_wise=filter_wise).merge(bank)
    monkeypatch.setattr("fedmerge.merging.methods.model_stock.MANY", 5)
    torch.testing.assert_close(load_method("model_stock", filter_wise=filter_wise).merge(bank), wanted, rtol=1e-9, atol=1e-12)
