"""The bank: the merged model is what a naive merge of state dicts gives, and bad experts are named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.errors import CheckpointError
from fedmerge.merging.bank import buffers
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.layout import Parts, head_names
from fedmerge.merging.bank.row_storage import CORRECTIONS, MANY, RunningSum, weighted_sum
from fedmerge.merging.evidence import Evidence
from tests.conftest import Net, expert_states

BATCH = torch.linspace(-1, 1, 5 * 64, dtype=torch.float64).view(5, 1, 8, 8).sin()


def naive(states: list[dict[str, torch.Tensor]], encoder: list[float], head: list[float]) -> dict[str, torch.Tensor]:
    """Tensor by tensor, in plain loops."""
    merged = {}
    for name, first in states[0].items():
        weights = head if name.startswith("head.") else encoder
        if first.is_floating_point():
            merged[name] = sum(w * state[name].double() for w, state in zip(weights, states, strict=True))
        else:
            merged[name] = first
    return merged


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_a_merge_equals_the_naive_one(encoder: list[float], head: list[float]) -> None:
    states = expert_states(3)
    encoder, head = [w / sum(encoder) for w in encoder], [w / sum(head) for w in head]
    bank = Bank.of(Net(), states, dtype=torch.float64)
    a, b = torch.tensor(encoder, dtype=torch.float64), torch.tensor(head, dtype=torch.float64)
    theta = bank.mix(a, b)
    wanted = naive(states, encoder, head)
    for name, tensor in bank.state_dict(theta, a).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-12, atol=1e-12)
    model = Net().double().eval()
    model.load_state_dict(wanted)
    torch.testing.assert_close(bank.forward(theta, BATCH, a), model(BATCH), rtol=1e-10, atol=1e-10)


def test_one_hot_returns_that_expert_bit_for_bit() -> None:
    bank = Bank.of(Net(), expert_states(3))
    for k in range(3):
        one = torch.nn.functional.one_hot(torch.tensor(k), 3).double()
        assert torch.equal(bank.mix(one, one), bank.theta[k])
        logits = bank.forward(bank.mix(one, one), BATCH, one)
        assert torch.equal(logits, bank.expert_logits(BATCH)[k])


def test_experts_run_as_their_own_models() -> None:
    states = expert_states(2)
    bank = Bank.of(Net(), states)
    for state, logits in zip(states, bank.expert_logits(BATCH), strict=True):
        model = Net().eval()
        model.load_state_dict(state)
        assert torch.equal(logits, model(BATCH.float()))


def test_encoder_and_head_are_told_apart() -> None:
    bank = Bank.of(Net(), expert_states(2))
    assert bank.parts.head == ("head.weight", "head.bias")
    assert bank.head == slice(bank.P - 15, bank.P)
    theta = bank.mix(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert torch.equal(theta[bank.encoder], bank.theta[0][bank.encoder])
    assert torch.equal(theta[bank.head], bank.theta[1][bank.head])


def test_parts_cover_every_tensor_once() -> None:
    parts = Parts.of(Net())
    statistics = [name for pair in parts.statistics for name in pair]
    claimed = [*parts.encoder, *parts.head, *statistics, *parts.fixed]
    assert sorted(claimed) == sorted(Net().state_dict())
    assert set(parts.fixed) == {"table", "norm.num_batches_tracked"}


def test_a_broken_expert_with_weight_zero_is_not_read() -> None:
    rows = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")], [3.0, 4.0]])
    merged = weighted_sum(rows, torch.tensor([0.5, 0.0, 0.5]), torch.empty(2))
    assert torch.equal(merged, torch.tensor([2.0, 3.0]))


def shares_of_a_stream(K: int, batches: int, asked: int, seed: int) -> list[torch.Tensor]:
    """Shares (K,) of batch after batch: a few experts' change by themselves, all others' by one factor."""
    draw = torch.Generator().manual_seed(seed)
    shares, found = torch.full((K,), 1 / K, dtype=torch.float64), []
    for _ in range(batches):
        shares[torch.randperm(K, generator=draw)[:asked]] *= torch.rand(asked, generator=draw, dtype=torch.float64) * 3
        shares /= shares.sum()
        found.append(shares.clone())
    return found


@settings(max_examples=20, deadline=None)
@given(st.integers(MANY + 2, 200), st.integers(0, 30), st.integers(0, 9999), st.integers(1, 11))
def test_a_running_sum_is_the_sum(K: int, asked: int, seed: int, cut: int) -> None:
    """Also where a row leaves and comes back; who goes on from what is known of the past gets the same bits."""
    rows = torch.randn(K, 50, generator=torch.Generator().manual_seed(seed))
    add, again = RunningSum(), RunningSum()
    for number, shares in enumerate(shares_of_a_stream(K, 12, asked, seed)):
        weights = shares.index_fill(0, torch.arange(number % 3), 0)
        found = add(rows, weights, torch.empty(50))
        torch.testing.assert_close(found.double(), weights @ rows.double(), rtol=1e-5, atol=1e-6)
        if number >= cut:
            assert torch.equal(again(rows, weights, torch.empty(50)), found)
        again = RunningSum(torch.stack(add.past)) if number < cut else again
        assert again.at(torch.stack(add.past)) is again


def test_a_running_sum_reads_what_has_changed() -> None:
    K, P, read, reads = 1000, 10, list[int](), list[int]()
    rows, add = torch.randn(K, P), RunningSum()
    weights = torch.empty(K, dtype=torch.float64)
    for shares in shares_of_a_stream(K, CORRECTIONS + 4, 20, 0):
        weights.copy_(shares)  # in place
        read.clear()
        found = add(rows, weights, torch.empty(P), read.append)
        torch.testing.assert_close(found.double(), shares @ rows.double(), rtol=1e-4, atol=1e-5)
        reads.append(sum(read))
    whole, some = 4 * K * P, 4 * K * P * 20 // K
    assert reads[0] == whole  # the first has no past
    assert whole < reads[1] <= whole + some  # the second tells that a sum is worth keeping
    assert max(reads[2 : 1 + CORRECTIONS]) <= some
    assert reads[1 + CORRECTIONS] == whole
    assert reads[2 + CORRECTIONS] <= some


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30, -1e12])
def test_an_extreme_row_that_leaves_a_running_sum_leaves_nothing(value: float) -> None:
    rows, add = torch.randn(100, 10), RunningSum()
    rows[7, 3] = value
    weights = torch.full((100,), 0.01)
    for _ in range(3):
        assert bool(add(rows, weights, torch.empty(10))[3].abs() > 1e9) or not abs(value) < torch.inf
    weights[7] = 0
    torch.testing.assert_close(add(rows, weights, torch.empty(10)), weighted_sum(rows, weights, torch.empty(10)))


def test_the_moment_policy_is_the_variance_of_the_mixture() -> None:
    states = expert_states(2)
    bank = Bank.of(Net(), states, dtype=torch.float64, variance="moment")
    a = torch.tensor([0.25, 0.75], dtype=torch.float64)
    mu = [state["norm.running_mean"].double() for state in states]
    v = [state["norm.running_var"].double() for state in states]
    mean = 0.25 * mu[0] + 0.75 * mu[1]
    spread = 0.25 * (v[0] + (mu[0] - mean) ** 2) + 0.75 * (v[1] + (mu[1] - mean) ** 2)
    torch.testing.assert_close(bank.buffers.merged(a)["norm.running_var"], spread, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", ["linear", "moment"])
@pytest.mark.parametrize("shape", [(3,), (6, 3)])
@pytest.mark.parametrize("held", [1, 40, 2**22])
def test_norms_of_several_widths_are_mixed_each_by_itself(
    policy: str, shape: tuple[int, ...], held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are mixed at once, some of their features at a time."""
    monkeypatch.setattr(buffers, "DEVIATIONS", held)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    states = [
        {name: torch.rand(x.shape) if x.is_floating_point() else x for name, x in model.state_dict().items()} for _ in range(3)
    ]
    a = torch.rand(shape, dtype=torch.float64).softmax(-1)
    found = Bank.of(model, states, dtype=torch.float64, variance=policy).buffers.statistics(a)
    assert list(found) == ["0.running_mean", "0.running_var", "2.running_mean", "2.running_var"]
    for norm in ("0", "2"):
        mu, v = (torch.stack([state[f"{norm}.running_{kind}"].double() for state in states]) for kind in ("mean", "var"))
        mean = torch.einsum("...k,kf->...f", a, mu)
        variance = torch.einsum("...k,kf->...f", a, v + mu**2 * (policy == "moment")) - mean**2 * (policy == "moment")
        torch.testing.assert_close(found[f"{norm}.running_mean"], mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(found[f"{norm}.running_var"], variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [(0.25, 0.75), ((0.25, 0.75), (1.0, 0.0), (0.5, 0.5))])
def test_a_small_variance_beside_a_large_mean_stays_positive(rows: tuple[object, ...]) -> None:
    """In float32, where 100^2 has no room for 1e-4."""
    mu, v = (100.0, 100.01), (1e-4, 2e-4)
    states = [
        state
        | {
            "norm.running_mean": torch.full_like(state["norm.running_mean"], m),
            "norm.running_var": torch.full_like(state["norm.running_var"], s),
        }
        for state, m, s in zip(expert_states(2), mu, v, strict=True)
    ]
    a = torch.tensor(rows, dtype=torch.float64)
    found = Bank.of(Net(), states, variance="moment").buffers.statistics(a)["norm.running_var"]
    m, s = torch.tensor(mu).double(), torch.tensor(v).double()
    wanted = a @ s + (a * (m - (a @ m)[..., None]) ** 2).sum(-1)
    torch.testing.assert_close(found.double(), wanted[..., None].expand(found.shape), rtol=0.02, atol=0)


def numbered(states: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The states with counts of batches of their own."""
    return [state | {"norm.num_batches_tracked": torch.tensor(7 + k)} for k, state in enumerate(states)]


@pytest.mark.parametrize("policy", ["linear", "moment"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_hot_coefficients_are_that_expert_to_the_last_bit(policy: str, dtype: torch.dtype) -> None:
    experts, base = numbered(expert_states(3)), expert_states(1, 5)[0]
    bank = Bank.of(Net(), experts, base, dtype=dtype, variance=policy)
    for k, state in enumerate([*experts, base]):
        alone = torch.nn.functional.one_hot(torch.tensor(k), 4).double()
        theta = bank.mix(alone)
        assert torch.equal(bank.forward(theta, BATCH), bank.row_logits(k, BATCH))
        assert torch.equal(bank.forward(theta.clone(), BATCH, alone), bank.row_logits(k, BATCH))
        assert torch.equal(bank.forward(bank.rows[k], BATCH), bank.row_logits(k, BATCH))  # a row of the bank is its own
        for found in (bank.state_dict(theta), bank.state_dict(bank.rows[k]), bank.state_dict(theta.clone(), alone)):
            assert all(torch.equal(found[n], t.to(dtype) if t.is_floating_point() else t) for n, t in state.items())
    rows = bank.buffers.statistics(torch.eye(3, 4))
    assert all(torch.equal(rows[name], bank.buffers.stacked[name][:3]) for name in rows)


def test_batch_norm_statistics_follow_the_merge() -> None:
    states = expert_states(3)
    bank = Bank.of(Net(), states, dtype=torch.float64)
    for weights in ([0.7, 0.2, 0.1], [0.0, 0.5, 0.5]):
        wanted = naive(states, weights, weights)
        theta = bank.mix(torch.tensor(weights, dtype=torch.float64))
        found, model = bank.state_dict(theta), Net().double().eval()
        for name in ("norm.running_mean", "norm.running_var"):
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=1e-12)
        model.load_state_dict(wanted)
        torch.testing.assert_close(bank.forward(theta, BATCH), model(BATCH), rtol=1e-10, atol=1e-10)
    merged = bank.mix(torch.tensor([0.7, 0.2, 0.1]))
    assert bank.mix(torch.tensor([0.0, 1.0, 0.0])) is merged  # the bank's own buffer, written over
    assert torch.equal(bank.forward(merged, BATCH), bank.row_logits(1, BATCH))


def test_a_variance_is_never_extrapolated() -> None:
    bank = Bank.of(Net(), expert_states(3), expert_states(1, 5)[0], dtype=torch.float64)
    uniform = bank.buffers.merged()
    for outside in ([1.5, -0.5, 0.0], [0.3, 0.3, 0.3], [0.9, 0.9, 0.9, -1.7]):
        found = bank.state_dict(bank.mix(torch.tensor(outside)))
        assert torch.equal(found["norm.running_var"], uniform["norm.running_var"]), outside
    convex = bank.mix(torch.tensor([0.3, 0.3, 0.3, 0.1]))
    assert not torch.equal(bank.state_dict(convex)["norm.running_var"], uniform["norm.running_var"])


def test_the_mean_of_valid_experts_has_their_statistics() -> None:
    states = expert_states(3)
    bank = Bank.of(Net(), states, dtype=torch.float64)
    bank.rows[1] = torch.nan
    bank.buffers.stacked["norm.running_var"][1] = torch.nan
    wanted = naive([states[0], states[2]], [0.5, 0.5], [0.5, 0.5])
    model = Net().double().eval()
    model.load_state_dict(wanted)
    found = Evidence(bank, BATCH).anchor_log_p("mean")
    torch.testing.assert_close(found, model(BATCH).log_softmax(-1), rtol=1e-10, atol=1e-10)


def test_a_merged_state_loads_into_the_model_and_integers_stay() -> None:
    bank = Bank.of(Net(), expert_states(3))
    state = bank.state_dict(bank.theta.mean(0))
    Net().load_state_dict(state)
    assert torch.equal(state["table"], torch.arange(4))
    assert state["norm.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("head.bias"), r"site-b does not fit.*missing: head\.bias \(3,\)"),
        (lambda s: s.update(extra=torch.zeros(2)), r"unexpected: extra \(2,\)"),
        (lambda s: s.update({"head.bias": torch.zeros(4)}), r"shape of head\.bias: found \(4,\), expected \(3,\)"),
        (lambda s: s.update({"stem.bias": torch.zeros(4, dtype=torch.int64)}), r"dtype of stem\.bias"),
        (lambda s: s["scale"].fill_(float("nan")), r"values of scale: found NaN"),
    ],
)
def test_an_expert_that_does_not_fit_is_named(change: object, said: str) -> None:
    good, bad = expert_states(2)
    change(bad)
    with pytest.raises(CheckpointError, match=f"(?s){said}"):
        Bank.of(Net(), {"site-a": good, "site-b": bad})


def test_tables_must_agree() -> None:
    first, second = expert_states(2)
    second["table"] = second["table"].flip(0)
    with pytest.raises(CheckpointError, match="table that differs between experts"):
        Bank.of(Net(), [first, second])


def test_a_bank_needs_an_expert_and_a_known_head() -> None:
    with pytest.raises(CheckpointError, match="found no expert"):
        Bank.of(Net(), [])
    with pytest.raises(CheckpointError, match="expected a list of parameters"):
        head_names(Net(), ["hed.weight"])
    with pytest.raises(CheckpointError, match="no final classifier"):
        head_names(torch.nn.Conv2d(1, 1, 1))
