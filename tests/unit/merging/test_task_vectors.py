"""Later rules about task vectors against references written differently: dictionaries of numpy arrays, float64, loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import fedmerge
from fedmerge.errors import MethodError
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.methods._base import load_method
from fedmerge.merging.methods._spectral import orthogonal, spectrum
from fedmerge.merging.methods.breadcrumbs import Breadcrumbs
from fedmerge.merging.methods.dare import Draws, cut_at, rescaling
from fedmerge.merging.methods.della import Della
from fedmerge.merging.methods.iso_cts import IsoCts
from fedmerge.merging.methods.lines import depths
from fedmerge.merging.methods.tsv_m import side_by_side

Array = NDArray[np.float64]
Arrays = dict[str, Array]
State = dict[str, Tensor]


class Tower(nn.Module):
    """Matrices of three shapes, three blocks, and what lies before, after and beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        self.embed = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.token[0]
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(self.norm(x))


def a_state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in Tower().named_parameters()}


BASE = a_state(99)
CASES: dict[str, list[State]] = {
    "one": [a_state(1)],
    "two": [a_state(1), a_state(2)],
    "three": [a_state(1), a_state(2), a_state(3)],
    "one at theta_0": [a_state(1), BASE, a_state(3)],
    "identical": [a_state(1)] * 3,
    "all at theta_0": [BASE, BASE],
    "more than directions": [a_state(seed) for seed in range(1, 6)],
}
NAMES = list(BASE)


def a_bank(states: list[State], dtype: torch.dtype = torch.float64) -> Bank:
    return Bank.of(Tower(), {f"site-{k}": state for k, state in enumerate(states)}, BASE, dtype=dtype)


def merged(states: list[State], name: str, **given: Any) -> Arrays:
    bank = a_bank(states)
    return {name: tensor.numpy() for name, tensor in bank.state_dict(load_method(name, **given).merge(bank)).items()}


def taus(states: list[State]) -> list[Arrays]:
    return [{name: (state[name] - BASE[name]).numpy() for name in NAMES} for state in states]


def alike(found: Arrays, tau: Callable[[str], Array]) -> None:
    for name in NAMES:
        np.testing.assert_allclose(found[name], BASE[name].numpy() + tau(name), rtol=1e-9, atol=1e-9, err_msg=name)


def polar(columns: list[Array]) -> Array:
    """M (M^T M)^(-1/2) on the span of M."""
    M = np.stack(columns, 1)
    values, Q = np.linalg.eigh(M.T @ M)
    kept = values > 1e-12 * max(values.max(), 1e-300)
    return M @ Q[:, kept] @ np.diag(values[kept] ** -0.5) @ Q[:, kept].T


def triples(M: Array, most: int, size: float) -> list[tuple[Array, float, Array]]:
    """The leading singular directions that are there."""
    U, S, Vh = np.linalg.svd(M)
    return [(U[:, i], float(S[i]), Vh[i]) for i in range(min(most, len(S))) if S[i] > 1e-12 * size]


def joined(found: list[tuple[Array, float, Array]], shape: tuple[int, ...], equal: bool) -> Array:
    if not found:
        return np.zeros(shape)
    S = np.array([s for _, s, _ in found])
    return polar([u for u, _, _ in found]) @ np.diag(np.full(len(S), S.mean()) if equal else S) @ polar([v for *_, v in found]).T


@pytest.mark.parametrize("case", CASES)
def test_iso_c(case: str) -> None:
    tau = taus(CASES[case])

    def wanted(name: str) -> Array:
        mean = sum(one[name] for one in tau) / len(tau)
        if mean.ndim != 2:
            return 1.3 * mean
        U, S, Vh = np.linalg.svd(mean, full_matrices=False)
        return 1.3 * S.mean() * U @ Vh

    alike(merged(CASES[case], "iso_c", scale=1.3), wanted)


def test_iso_c_makes_all_singular_values_equal_and_keeps_their_sum() -> None:
    tau = taus(CASES["three"])
    found = merged(CASES["three"], "iso_c")
    for name in ("embed.weight", "blocks.1.weight", "head.weight"):
        S = np.linalg.svd(found[name] - BASE[name].numpy(), compute_uv=False)
        mean = sum(one[name] for one in tau) / 3
        np.testing.assert_allclose(S, S.mean())
        np.testing.assert_allclose(S.sum(), np.linalg.svd(mean, compute_uv=False).sum())


def test_iso_c_leaves_a_direction_in_which_nobody_moved() -> None:
    """In float32, too: what an SVD completes U and V with is not taken for a direction."""
    states = [{**state, "blocks.0.weight": BASE["blocks.0.weight"].clone()} for state in CASES["two"]]
    for k, state in enumerate(states):
        state["blocks.0.weight"][1:3] += a_state(k)["blocks.0.weight"][1:3]
    for dtype, places in ((torch.float64, 12), (torch.float32, 5)):
        for name in ("iso_c", "iso_cts", "tsv_m"):
            bank = a_bank(states, dtype)
            W = bank.state_dict(load_method(name).merge(bank))["blocks.0.weight"].double().numpy() - BASE["blocks.0.weight"].numpy()
            np.testing.assert_array_almost_equal(W[[0, 3, 4, 5]], 0, places)
            assert abs(W[1:3]).max() > 0.1


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_iso_cts(case: str, share: float) -> None:
    tau, K = taus(CASES[case]), len(CASES[case])

    def wanted(name: str) -> Array:
        if tau[0][name].ndim != 2:
            return sum(one[name] for one in tau) / K
        r = min(tau[0][name].shape)
        n = min(round((r - int(share * r)) / K), r // K)
        total = sum(one[name] for one in tau)
        found = triples(total, r - n * K, np.linalg.norm(total))
        common = sum((np.outer(u, u) for u, *_ in found), np.zeros((len(total), len(total))))
        for one in tau:
            found += triples(one[name] - common @ one[name], n, np.linalg.norm(one[name]))
        return joined(found, total.shape, equal=True) / K

    alike(merged(CASES[case], "iso_cts", share=share), wanted)


@pytest.mark.parametrize(("case", "share"), [("one", 0.8), ("one", 0.0), ("three", 1.0)])
def test_iso_cts_of_one_expert_or_no_specific_directions_is_iso_c(case: str, share: float) -> None:
    found, wanted = merged(CASES[case], "iso_cts", share=share), merged(CASES[case], "iso_c")
    for name in NAMES:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_tsv_m(case: str) -> None:
    tau, K = taus(CASES[case]), len(CASES[case])

    def wanted(name: str) -> Array:
        if tau[0][name].ndim != 2:
            return 0.8 * sum(one[name] for one in tau) / K
        n = max(1, min(tau[0][name].shape) // K)
        found = [triple for one in tau for triple in triples(one[name], n, np.linalg.norm(one[name]))]
        return 0.8 * joined(found, tau[0][name].shape, equal=False)

    alike(merged(CASES[case], "tsv_m", scale=0.8), wanted)


def test_tsv_m_of_one_expert_is_the_expert_and_of_identical_ones_its_leading_directions() -> None:
    alike(merged(CASES["one"], "tsv_m"), lambda name: taus(CASES["one"])[0][name])
    tau = taus(CASES["identical"])[0]["blocks.2.weight"]
    U, S, Vh = np.linalg.svd(tau)
    found = merged(CASES["identical"], "tsv_m")["blocks.2.weight"] - BASE["blocks.2.weight"].numpy()
    np.testing.assert_allclose(found, U[:, :2] @ np.diag(S[:2]) @ Vh[:2], atol=1e-10)


def test_tsv_m_adds_orthogonal_experts_without_loss() -> None:
    Q, R = (np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))[0] for seed in (0, 1))
    S = np.array([3.0, 2.5, 2, 1.5, 1, 0.5])
    tau = np.stack([Q[:, at] @ np.diag(S[at]) @ R[:, at].T for at in (slice(0, 2), slice(2, 4), slice(4, 6))])
    np.testing.assert_allclose(side_by_side(torch.from_numpy(tau)).numpy(), tau.sum(0), atol=1e-12)


def test_singular_directions_by_hand() -> None:
    tau = torch.tensor([[[2.0, 0], [0, 0]], [[0, 0], [0, 1]]])
    assert side_by_side(tau).tolist() == [[2, 0], [0, 1]]
    torch.testing.assert_close(IsoCts(share=0)._joint(tau), torch.eye(2) * 0.75)
    M = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(orthogonal(M).T @ orthogonal(M), torch.eye(3, dtype=torch.float64))
    twice = torch.cat([M, M], 1)
    torch.testing.assert_close(orthogonal(twice), torch.cat([orthogonal(M)] * 2, 1) / 2**0.5)
    U, S, Vh = spectrum(M @ M.T)
    assert int((S > 0).sum()) == 3
    assert not U[:, 3:].any()
    assert not Vh[3:].any()


def test_lines_scales_blocks_by_depth() -> None:
    mean = {name: sum(one[name] for one in taus(CASES["two"])) / 2 for name in NAMES}
    scale = {"token": 0.2, "embed": 0.2, "blocks.0": 0.2, "blocks.1": 0.5, "blocks.2": 0.8, "norm": 0.8, "head": 0.8}

    def wanted(name: str) -> Array:
        return next(s for prefix, s in scale.items() if name.startswith(prefix)) * mean[name]

    alike(merged(CASES["two"], "lines", a=0.2, b=0.6), wanted)


@pytest.mark.parametrize("of", ["ties", {"ties": {"keep": 0.5, "combine": "sum"}}, "task_arithmetic", "iso_c", "lines"])
@pytest.mark.parametrize("case", ["one", "three", "one at theta_0", "identical"])
def test_lines_of_another_rule(case: str, of: Any) -> None:
    name, fields = (of, {}) if isinstance(of, str) else next(iter(of.items()))
    inner = merged(CASES[case], name, **fields)
    scale = dict(zip(a_bank(CASES[case]).shapes, depths(a_bank(CASES[case])), strict=True))
    alike(merged(CASES[case], "lines", of=of), lambda name: (0.3 + 0.7 * scale[name]) * (inner[name] - BASE[name].numpy()))


def test_lines_with_equal_scales_is_a_scaled_rule() -> None:
    """a = 1, b = 0 is the mean, a = 0.5 WiSE-FT."""
    for found, wanted in (
        (merged(CASES["three"], "lines", a=1, b=0), merged(CASES["three"], "mean")),
        (merged(CASES["three"], "lines", a=0.5, b=0), merged(CASES["three"], "wise_ft")),
    ):
        for name in NAMES:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-12, atol=1e-12)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[float]]] = {
    "no blocks": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 2)),
        [0, 0, 0.5, 0.5, 1, 1],
    ),
    "two layers": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), [0, 0, 1, 1]),
    "a head alone": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), [1, 1]),
    "blocks to the head": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), [0, 0, 0.5, 0.5, 1, 1]),
    "one block": (lambda: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)), [1, 1, 1, 1]),
}


@pytest.mark.parametrize("name", MODELS)
def test_depths_of_small_models(name: str) -> None:
    build, wanted = MODELS[name]
    assert depths(Bank.of(build(), [build().state_dict()])) == wanted


WRONG: list[tuple[Any, str]] = [
    ("tiess", "did you mean 'ties'"),
    ("eam", "is not one model that is merged once"),
    ({"mixup": {"draws": 3}}, "is not one model that is merged once"),
    ({"ties": {"keep": 3}}, "ties.keep is 3: Input should be less than or equal to 1"),
    ({"ties": {"kep": 1}}, "ties.kep is 1: unknown key; did you mean 'keep'"),
    ({"ties": {}, "mean": {}}, "found {'ties': {}, 'mean': {}}; expected a static method: ties, or {ties: {keep: 0.5}}"),
    ({"ties": 3}, "found {'ties': 3}; expected a static method: ties, or {ties: {keep: 0.5}}"),
    ({}, "found {}; expected a static method"),
    (3, "found 3; expected a static method"),
    (["ties"], "found ['ties']; expected a static method"),
]


@pytest.mark.parametrize(("of", "said"), WRONG)
def test_a_rule_that_lines_cannot_scale_is_named(of: Any, said: str) -> None:
    with pytest.raises(MethodError, match=r"method lines\.of") as caught:
        fedmerge.merge(Tower(), CASES["two"], "lines", BASE, of=of)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "value error" not in str(caught.value).lower()


def test_lines_needs_what_its_rule_needs() -> None:
    assert load_method("lines").needed == {"theta_0"}
    assert load_method("lines", of="fisher").needed == {"theta_0", "fisher"}
    assert load_method("lines", of="fisher").whole
    assert not load_method("lines", of="iso_c").whole
    assert load_method("lines", of={"ties": None}).of == {"ties": {}}  # as an empty mapping in YAML
    with pytest.raises(MethodError, match="found no counts"):
        fedmerge.merge(Tower(), CASES["two"], "lines", BASE, of="weighted_mean")


@pytest.mark.parametrize("least", [0, 1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_consensus_ta(case: str, least: int) -> None:
    tau = taus(CASES[case])

    def wanted(name: str) -> Array:
        flat = [one[name].ravel() for one in tau]
        out = []
        for i in range(flat[0].size):
            total = sum(one[i] for one in flat)
            active = sum(abs(one[i]) > 0.4 * abs(total - one[i]) for one in flat)
            out.append(0.3 * total if active >= least else 0.0)
        return np.array(out).reshape(tau[0][name].shape)

    alike(merged(CASES[case], "consensus_ta", least=least), wanted)


def test_consensus_ta_by_hand_and_alone() -> None:
    method: Any = load_method("consensus_ta")
    assert method._shared(torch.tensor([[4.0, 1.0], [2.0, -3.0]])).tolist() == [6, 0]
    alike(merged(CASES["one"], "consensus_ta"), lambda name: np.zeros(BASE[name].shape))  # nothing is shared
    alike(merged(CASES["one"], "consensus_ta", least=1), lambda name: 0.3 * taus(CASES["one"])[0][name])
    found, wanted = merged(CASES["three"], "consensus_ta", least=0), merged(CASES["three"], "task_arithmetic")
    for name in NAMES:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-12)


@pytest.mark.parametrize(("beta", "gamma"), [(0.85, 0.01), (0.5, 0.25), (0.0, 0.0), (0.9, 0.1), (0.0, 1.0)])
@pytest.mark.parametrize("case", CASES)
def test_breadcrumbs(case: str, beta: float, gamma: float) -> None:
    def crumbs(tau: Array) -> Array:
        flat = tau.ravel()
        by_size = sorted(range(flat.size), key=lambda i: abs(flat[i]))
        dropped = {*by_size[: int(beta * flat.size)], *(by_size[-int(gamma * flat.size) :] if int(gamma * flat.size) else [])}
        return np.array([0.0 if i in dropped else x for i, x in enumerate(flat)]).reshape(tau.shape)

    tau = taus(CASES[case])
    alike(merged(CASES[case], "breadcrumbs", beta=beta, gamma=gamma), lambda name: 0.3 * sum(crumbs(one[name]) for one in tau))


def test_breadcrumbs_keeps_exactly_the_share_also_among_equals() -> None:
    kept = Breadcrumbs(beta=0.85, gamma=0.01)._crumbs(torch.ones(2, 1000))
    assert kept.sum(1).tolist() == [140, 140]
    assert Breadcrumbs(beta=0.5, gamma=0.25)._crumbs(torch.tensor([[1.0, -2, 3, -4]])).tolist() == [[0, 0, 3, 0]]
    with pytest.raises(ValueError, match=r"beta \+ gamma is 1\.2"):
        Breadcrumbs(beta=0.85, gamma=0.35)


@pytest.mark.parametrize("rank_in", ["row", "tensor"])
@pytest.mark.parametrize("case", CASES)
def test_della(case: str, rank_in: str) -> None:
    """p 0.4, e 0.3, by loops over rows, with the draws of every expert in one piece."""
    thinned = []
    for k, tau in enumerate(taus(CASES[case])):
        u = Draws(5, f"site-{k}").take(a_bank(CASES[case]).P).double().numpy() / 2**16 + 0.5
        flat, at = [], 0
        for name in a_bank(CASES[case]).shapes:
            rows = tau[name].reshape(len(tau[name]) if rank_in == "row" and tau[name].ndim > 1 else 1, -1)
            for row in rows:
                by_size = sorted(range(len(row)), key=lambda i: abs(row[i]))
                for i, x in enumerate(row):
                    p = 0.4 + 0.15 - 0.3 * by_size.index(i) / (len(row) - 1) if len(row) > 1 else 0.4
                    p = round(p * 2**16) / 2**16
                    flat.append(x / (1 - p) if u[at] >= p else 0.0)
                    at += 1
        thinned.append(flat)
    total = np.sum(thinned, 0)
    sign = np.where(total == 0, np.sign(np.sign(total).sum()), np.sign(total))
    agreeing = [[row[i] for row in thinned if row[i] != 0 and np.sign(row[i]) == sign[i]] for i in range(len(total))]
    wanted = [0.3 * sum(found) / (len(found) or 1) for found in agreeing]
    bank = a_bank(CASES[case])
    found = load_method("della", drop=0.4, window=0.3, rank_in=rank_in, seed=5).merge(bank) - bank.base
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)


@given(parts=st.lists(st.integers(0, 9), max_size=8), seed=st.integers(0, 2**40))
def test_draws_are_the_same_in_parts_and_in_one_piece(parts: list[int], seed: int) -> None:
    whole, some = Draws(seed, "axial").take(sum(parts)), Draws(seed, "axial")
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int16), *(some.take(count) for count in parts)]), whole)


def test_draws_are_even_and_probabilities_are_met() -> None:
    drawn = Draws(0, "axial").take(2**18).long() + 2**15
    for bit in range(16):  # also where four come from one number
        for lane in range(4):
            assert abs((drawn[lane::4] >> bit & 1).double().mean() - 0.5) < 5 * 0.5 / 2**8
    for p in (0.0, 1e-9, 0.3, 0.5, 0.999, 1 - 2**-40):
        cut = cut_at(torch.tensor(p, dtype=torch.float64))
        stay = torch.arange(-(2**15), 2**15) >= cut
        assert int(stay.sum()) >= 1
        assert float(rescaling(cut)) == 2**16 / int(stay.sum())
        assert abs(1 - int(stay.sum()) / 2**16 - p) <= (2**-17 if p < 0.9999 else 2**-16)


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.5, 0.9])
def test_della_without_a_window_is_dare_before_an_election(drop: float) -> None:
    for case in CASES.values():
        found = load_method("della", window=0, drop=drop, seed=3).merge(a_bank(case))
        wanted = load_method("dare", then="ties", keep=1, drop=drop, seed=3).merge(a_bank(case))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_della_drops_small_entries_more_often_and_keeps_what_it_expects() -> None:
    method = Della(drop=0.5, window=0.2)
    p = method._cuts(torch.tensor([[1.0, 3.0, 2.0]])) / 2**16 + 0.5
    torch.testing.assert_close(p, torch.tensor([[0.6, 0.4, 0.5]]), atol=2**-17, rtol=0)
    assert method._cuts(torch.ones(3, 1)).unique().tolist() == [0]
    bank = a_bank(CASES["one"])
    moved = [load_method("della", scale=1.0, seed=seed, window=0.8).merge(bank) - bank.base for seed in range(1500)]
    spread = bank.tau[0].abs() * 3  # the standard deviation of one draw is |tau| sqrt(p / (1 - p)), p at most 0.9
    assert bool(((torch.stack(moved).mean(0) - bank.tau[0]).abs() < 5 * spread / 1500**0.5).all())
    with pytest.raises(ValueError, match=r"0\.89 to 1\.09: probabilities"):
        Della(drop=0.99, window=0.2)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv_m", "consensus_ta", "breadcrumbs", "della"])
@pytest.mark.parametrize("case", CASES)
def test_a_scale_of_zero_is_theta_0_and_float32_agrees(name: str, case: str) -> None:
    bank = a_bank(CASES[case])
    assert torch.equal(load_method(name, scale=0).merge(bank), bank.base)
    single = a_bank(CASES[case], torch.float32)
    torch.testing.assert_close(load_method(name).merge(single).double(), load_method(name).merge(bank), rtol=1e-4, atol=2e-4)
