"""A bank over shards is a bank: in float64, whatever the division, for every method that is not refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.merging.bank import sharded
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.row_storage import Shelf
from fedmerge.merging.bank.sharded import Here, SpreadBank
from fedmerge.merging.methods._base import METHODS, load_method
from tests.banks import COUNTS, TEMPERATURES, a_bank, a_batch, outcome, statistics
from tests.conftest import Net, expert_states

STATES = expert_states(4)
ANCHORS = {"theta_0": expert_states(1, 99)[0], "generalist": expert_states(1, 98)[0]}
SPREADABLE = [name for name in METHODS.names if not METHODS.load(name)().whole and name != "expert"]


def a_spread_bank(*sizes: int, states: list[dict[str, torch.Tensor]] = STATES) -> SpreadBank:
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    groups = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    banks = [Bank.of(Net(), {f"site-{k}": states[k] for k in group}, ANCHORS["theta_0"], dtype=torch.float64) for group in groups]
    shelf = Shelf(Net(), len(ANCHORS), dtype=torch.float64)
    for state in states[: sum(sizes)]:
        shelf.add_beside(state)
    for name, state in ANCHORS.items():
        shelf.add(name, state)
    bank = SpreadBank.over(Here(banks), shelf, [f"site-{k}" for k in range(sum(sizes))], list(ANCHORS))
    bank.counts, bank.temperatures = tuple(COUNTS), torch.tensor(TEMPERATURES, dtype=torch.float64)
    for kind in ("gram", "gram_rounds", "centroid"):
        bank.statistics.add(kind, statistics(list(range(4)), STATES)[kind], bank.like)
    return bank


@pytest.mark.parametrize("sizes", [(4,), (1, 3), (2, 1, 1)])
@pytest.mark.parametrize("name", SPREADABLE)
def test_a_method_predicts_the_same_from_shards(name: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """BLOCK_BYTES of a few columns, so that blocks really part them."""
    monkeypatch.setattr(sharded, "BLOCK_BYTES", 4 * 8 * 6 * 5)
    batch = a_batch()
    found, wanted = outcome(load_method(name), a_spread_bank(*sizes), batch), outcome(load_method(name), a_bank(STATES), batch)
    torch.testing.assert_close(found, wanted)


def test_a_scaled_head_is_brought_to_scale_from_shards() -> None:
    states = [{name: 20 * x if name.startswith("head.") else x for name, x in STATES[0].items()}, *STATES[1:]]
    method, batch = load_method("posterior"), a_batch()
    found, wanted = outcome(method, a_spread_bank(2, 2, states=states), batch), outcome(method, a_bank(states), batch)
    torch.testing.assert_close(found, wanted)


@given(st.lists(st.floats(-2, 2), min_size=6, max_size=6), st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_a_sum_over_shards_and_anchors_is_the_sum(encoder: list[float], head: list[float]) -> None:
    """(K + A,) for the encoder and (K,) for the head."""
    a, b = torch.tensor(encoder, dtype=torch.float64), torch.tensor(head, dtype=torch.float64)
    torch.testing.assert_close(MANY.mix(a, b), ONE.mix(a, b))


def test_a_shard_without_a_coefficient_is_not_asked() -> None:
    asked: list[int] = []

    class Counting(Here):
        def ask(self, what, arguments):  # type: ignore[no-untyped-def]
            asked.append(sum(given is not None for given in arguments))
            return super().ask(what, arguments)

    bank = a_spread_bank(2, 2)
    assert isinstance(bank.shards, Here)
    bank.shards = Counting(bank.shards.banks)
    bank.mix(torch.tensor([0.5, 0.5, 0, 0]))
    bank.mix(torch.tensor([0.0, 0, 0, 0, 1]))
    bank.mix(torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([0.0, 0, 0, 1]))
    assert asked == [1, 0, 2]


ONE, MANY = a_bank(STATES), a_spread_bank(1, 3)
