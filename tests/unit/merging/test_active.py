"""Many experts, of which a batch is shown to a few: who is asked, what it costs, and who gets coefficients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.functional import Adapter
from fedmerge.merging.methods._base import load_method
from fedmerge.merging.per_sample.dispatch import PerSample
from fedmerge.merging.predict import Prediction, Row, carry, predict, rows_of
from fedmerge.merging.scoring import active
from fedmerge.merging.scoring.latent import ITERATIONS
from tests.banks import a_batch
from tests.conftest import Net, expert_states
from tests.unit.merging.test_sharded import a_spread_bank

BASE = expert_states(1, 99)[0]


def a_large_bank(K: int, first: int = 0) -> Bank:
    states = expert_states(first + K)[first:]
    return Bank.of(Net(), {f"site-{first + k}": state for k, state in enumerate(states)}, BASE)


def a_row(bank: Bank, **fields: object) -> Row:
    (row,) = rows_of([load_method("posterior", active="auto", **fields)], bank).values()
    return row


def seen(row: Row, evidence: Evidence) -> Prediction:
    with torch.no_grad():
        return predict(row, evidence, PerSample(evidence.bank))


def asked(found: Prediction) -> int:
    assert found.coefficients is not None
    return int(found.coefficients.notes["forwarded"][0])


def told(K: int, good: int, N: int = 8) -> Tensor:
    """Logits (K, N, 3): one expert is sure and right, all others sure that another class of the three is in every image."""
    logits = torch.zeros(K, N, 3)
    logits[:, :, 1] = 0.1
    logits[good, :, 0] = 8.0
    return logits


@pytest.mark.parametrize("granularity", ["image", "batch"])
def test_up_to_24_experts_are_all_asked(granularity: str) -> None:
    bank, batch = a_large_bank(active.FEW), a_batch(dtype=torch.float32)
    found = [seen(rows_of([method], bank)[method.key], Evidence(bank, batch)) for method in (
        load_method("posterior", granularity=granularity), load_method("posterior", granularity=granularity, active="auto")
    )]  # fmt: skip
    assert torch.equal(found[0].log_p, found[1].log_p)
    assert "forwarded" not in found[1].notes


@pytest.mark.parametrize("granularity", ["image", "batch"])
def test_some_of_many_are_asked_and_the_others_are_one_model_for_all_images(granularity: str) -> None:
    bank, batch = a_large_bank(60), a_batch(dtype=torch.float32)
    row, counts = a_row(bank, granularity=granularity, fallback="none"), []
    for _ in range(5):
        evidence = Evidence(bank, batch)
        with evidence.billed() as bill:
            found = seen(row, evidence)
        assert found.coefficients is not None
        for part in (found.coefficients.encoder, found.coefficients.head):
            assert part.shape[-1] == 60 + 1 or (part.shape[-1] == 60 and found.coefficients.notes["towards_theta_0"] == [0])
            torch.testing.assert_close(part.sum(-1), torch.ones_like(part.sum(-1)))
            rest = part.reshape(-1, part.shape[-1])[:, sorted({*range(60)} - bill.views["none"])]
            assert bool((rest > 0).all())
            assert torch.equal(rest, rest[:1].expand_as(rest))
        counts.append(asked(found))
        assert len(bill.views["none"]) == asked(found)
        assert bill.forwards == evidence.forwards_run == asked(found) + 3  # the mean, wise_ft and model_stock are of all experts
    assert counts[:3] == [active.WIDE, active.MOST + active.WIDE, active.MOST + 60 - 2 * active.WIDE]  # those never asked first
    assert active.EXPLORED < counts[4] <= active.MOST + active.EXPLORED
    assert bool((row.state["turn"] > 0).all())


def test_the_expert_whose_images_these_are_is_found_and_kept() -> None:
    K = 80
    bank, batch = a_large_bank(K), a_batch(200, torch.float32)
    good = max(range(K), key=active._lots(bank.names).__getitem__)  # whose turn comes last
    row, shares = a_row(bank, panel=("ensemble",)), []
    for _ in range(8):
        evidence = Evidence(bank, batch)
        evidence.recall({"none": told(K, good, 200)})
        found = seen(row, evidence)
        shares.append(found.notes["shares"][good])
    assert max(shares[:2]) == pytest.approx(1 / K)  # nobody has asked it, and it loses nothing to those who were
    assert shares[2:] == sorted(shares[2:])
    assert shares[-1] > 0.6  # of 200 images and one more of each expert


def test_shares_of_those_who_are_not_asked_follow_those_of_a_sample() -> None:
    """The rest takes part in EM as one expert with its K - R images, and the mean likelihood of the sample: against numpy."""
    bank, N = a_large_bank(60), 8
    row = a_row(bank, panel=("ensemble",), rho=0.25)
    evidence = Evidence(bank, a_batch(N, torch.float32))
    seen(row, evidence)
    R = active.WIDE
    rows = np.flatnonzero(row.state["turn"].numpy())
    p = evidence.log_p().double().softmax(-1).numpy()[rows]
    s = (p * np.log(p.mean(0))).sum(-1) - -(p * np.log(p)).sum(-1)
    likelihood = np.concatenate([np.exp(s), np.exp(s).mean(0, keepdims=True)]).T
    images = np.array([1.0] * R + [60 - R])
    start = pi = images / 60
    for _ in range(ITERATIONS):
        r = pi * likelihood
        pi = ((r / r.sum(1, keepdims=True)).sum(0) + images) / (N + 60)
    pi = 0.25 * start + 0.75 * pi
    np.testing.assert_allclose(row.state["pi"].numpy()[rows], pi[:-1], rtol=1e-4)
    np.testing.assert_allclose(np.delete(row.state["pi"].numpy(), rows), pi[-1] / (60 - R), rtol=1e-4)


def test_experts_join_by_being_asked_next_and_leave() -> None:
    bank, batch = a_large_bank(60), a_batch(dtype=torch.float32)
    row = a_row(bank)
    for _ in range(3):
        seen(row, Evidence(bank, batch))
    states = dict(zip([f"site-{k}" for k in range(61)], expert_states(61), strict=True))
    later = Bank.of(Net(), {name: state for name, state in states.items() if name != "site-0"}, BASE)
    new = a_row(later)
    carry({"posterior": new}, {"posterior": row}, bank.names, later)
    assert new.state["turn"].tolist() == [*row.state["turn"].tolist()[1:], 0]
    evidence = Evidence(later, batch)
    with evidence.billed() as bill:
        seen(new, evidence)
    assert 59 in bill.views["none"]  # site-60
    few = a_large_bank(3)
    last = a_row(few)
    carry({"posterior": last}, {"posterior": new}, later.names, few)
    assert "turn" not in last.state
    assert bool((last.state["pi"] > 0).all())
    assert seen(last, Evidence(few, batch)).coefficients.encoder[:, :3].all()  # type: ignore[union-attr]
    again = a_row(later)  # and many again
    carry({"posterior": again}, {"posterior": last}, few.names, later)
    assert asked(seen(again, Evidence(later, batch))) == active.WIDE


def test_broken_experts_are_left_and_others_asked() -> None:
    bank, batch = a_large_bank(60), a_batch(dtype=torch.float32)
    first = active.candidates(active.start(60), torch.full((60,), 1 / 60), bank.names)[1]
    bank.rows[first, bank.head] = torch.nan
    row = a_row(bank, panel=("ensemble",))
    found = seen(row, Evidence(bank, batch))
    assert asked(found) == 2 * active.WIDE  # of the first nobody can speak
    assert found.coefficients is not None
    assert not found.coefficients.encoder[:, first].any()
    assert bool(torch.isfinite(found.log_p).all())
    assert not row.state["pi"][first].any()


@pytest.mark.parametrize("granularity", ["image", "batch"])
@pytest.mark.parametrize("K", [60, 150])
def test_a_method_goes_on_with_the_same_bits_from_its_state(K: int, granularity: str) -> None:
    """Also from 64 experts on, where a sum of most of them is corrected from batch to batch; and beside another row."""
    bank = a_large_bank(K)
    row, beside = (a_row(bank, granularity=granularity, fallback="none", beta=beta) for beta in (1.0, 0.5))
    for number in range(9):
        seen(row, Evidence(bank, a_batch(dtype=torch.float32, seed=number)))
        seen(beside, Evidence(bank, a_batch(dtype=torch.float32, seed=number)))
    if K > 64:
        assert len(row.state["sums"]) > 2  # sums have been corrected
    again = a_row(bank, granularity=granularity, fallback="none")
    again.state = {name: torch.from_numpy(value.numpy().copy()) for name, value in row.state.items()}
    for number in range(9, 12):
        x = a_batch(dtype=torch.float32, seed=number)
        assert torch.equal(seen(row, Evidence(bank, x)).log_p, seen(again, Evidence(bank, x)).log_p)


def test_the_same_bits_beside_methods_that_ask_all() -> None:
    bank, batch = a_large_bank(40), a_batch(dtype=torch.float32)
    alone = seen(a_row(bank), Evidence(bank, batch))
    beside = Evidence(bank, batch)
    beside.log_p()
    assert torch.equal(seen(a_row(bank), beside).log_p, alone.log_p)


def test_an_alarm_is_raised_where_the_stream_turns_and_by_nothing_else() -> None:
    state = active.start(2)
    for _ in range(20):
        state, alarm = active.alarmed(state, 3, 32)
        assert not alarm
    state, alarm = active.alarmed(state, 12, 32)
    assert alarm
    alarms = 0
    for _ in range(60):  # what the stream has become is what it used to be
        state, alarm = active.alarmed(state, 12, 32)
        alarms += alarm
    assert not alarm
    assert alarms < 30
    single = active.start(2)
    for number in range(300):
        single, alarm = active.alarmed(single, int(number % 10 == 0), 1)
        assert not alarm
    found = [active.alarmed(single, 1, 1)]
    while len(found) < 20 and not found[-1][1]:
        found.append(active.alarmed(found[-1][0], 1, 1))
    assert found[-1][1]


def test_an_alarm_shows_the_batch_to_more() -> None:
    bank, N = a_large_bank(80), 8
    row = a_row(bank, shrink="none")
    for _ in range(5):
        evidence = Evidence(bank, a_batch(N, torch.float32))
        quiet = seen(row, evidence)
    assert quiet.notes["alarm"] == [0]
    row.state["apart"] = torch.tensor([0, 2000, 3, 2], dtype=torch.float64)
    loud = seen(row, Evidence(bank, a_batch(N, torch.float32)))
    assert loud.notes["alarm"] == [1]
    assert asked(loud) == asked(quiet) + active.WIDE


def test_an_adapter_selects_and_lets_experts_join() -> None:
    states = dict(zip([f"site-{k}" for k in range(31)], expert_states(31), strict=True))
    last = states.pop("site-30")
    adapt = Adapter(Net(), states, method="posterior", base=BASE, active="auto")
    for _ in range(3):
        adapt(a_batch(dtype=torch.float32))
    assert adapt.coefficients is not None
    assert adapt.coefficients.notes["forwarded"] == [active.MOST + active.EXPLORED]
    adapt.join("site-30", last)
    adapt(a_batch(dtype=torch.float32))
    assert adapt.coefficients.encoder.shape[1] in (31, 32)
    adapt.reset()
    adapt(a_batch(dtype=torch.float32))
    assert adapt.coefficients.notes["forwarded"] == [active.WIDE]


@pytest.mark.parametrize("rows", [[2, 0], [3], [0, 1, 2, 3], [1, 3]])
def test_shards_speak_for_the_experts_that_are_asked(rows: list[int]) -> None:
    bank = a_spread_bank(1, 2, 1)
    assert torch.equal(bank.expert_logits(a_batch(), rows), bank.expert_logits(a_batch())[rows])


@pytest.mark.parametrize("granularity", ["image", "batch"])
def test_coefficients_sum_to_one_whoever_is_asked(granularity: str) -> None:
    bank = a_large_bank(60)
    row = a_row(bank, granularity=granularity)
    for number in range(6):
        found = seen(row, Evidence(bank, a_batch(dtype=torch.float32, seed=number)))
        assert found.coefficients is not None
        for part in (found.coefficients.encoder, found.coefficients.head):
            assert float((part.sum(-1) - 1).abs().max()) < 1e-12
        assert sum(found.notes["shares"]) == pytest.approx(1)


def test_predictions_are_not_mixed_of_a_minority() -> None:
    bank = a_large_bank(100)
    row = a_row(bank, shrink="none")
    row.state["answers"][-1, :2] = torch.tensor([100, 90])
    found = seen(row, Evidence(bank, a_batch(dtype=torch.float32)))
    assert asked(found) == active.WIDE < 50
    assert found.notes["mixed_predictions"] == [0]


def test_a_mixture_of_predictions_asks_nobody_else() -> None:
    bank = a_large_bank(40)
    row = a_row(bank, shrink="none")
    row.state["answers"][-1, :2] = torch.tensor([100, 90])  # the mean gives up what the ensemble is sure of
    evidence = Evidence(bank, a_batch(dtype=torch.float32))
    with evidence.billed() as bill:
        found = seen(row, evidence)
    assert found.notes["mixed_predictions"] == [1]
    assert found.log_p.dtype == torch.float32
    assert len(bill.views["none"]) == asked(found) == active.WIDE
    assert evidence.forwards_run == active.WIDE + 3
