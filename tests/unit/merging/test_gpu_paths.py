"""What runs in its own way on a GPU, as far as a CPU can tell; what is recorded needs a card and is skipped without one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmerge.merging.bank.patches import WindowProducts, patches
from fedmerge.merging.bank.recorded import Recorded
from fedmerge.merging.bank.row_storage import weighted_sum
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.per_sample.mixed_tensor import stacked
from tests.banks import a_bank, a_batch
from tests.conftest import expert_states

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_are_rounded_once(dtype: torch.dtype) -> None:
    rows = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    found = weighted_sum(rows, weights, torch.empty(1000, dtype=dtype))
    wanted = (weights[:, None] * rows.double()).sum(0)
    torch.testing.assert_close(found, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    ("layer", "side"),
    [
        (nn.Conv2d(3, 5, 4, 4), (12, 8)),
        (nn.Conv2d(2, 4, (2, 3), (2, 3), bias=False), (6, 9)),
        (nn.Conv2d(1, 2, 5, 5), (5, 5)),
    ],
)
def test_windows_that_do_not_overlap_are_products(layer: nn.Conv2d, side: tuple[int, int]) -> None:
    layer, x = layer.double(), torch.randn(3, layer.in_channels, *side, dtype=torch.float64)
    assert patches(x, layer.weight, (layer.stride, layer.padding, layer.dilation, layer.groups)) is not None
    wanted = layer(x)
    with WindowProducts():
        found = layer(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, 1),
        nn.Conv2d(4, 4, 2, 2, padding=1),
        nn.Conv2d(4, 4, 2, 2, groups=2),
        nn.Conv2d(4, 4, 2, 2, dilation=2),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 5, 5),
        nn.Conv2d(4, 4, 3, padding="same"),
    ],
)
def test_other_convolutions_stay_what_they_are(layer: nn.Conv2d) -> None:
    x = torch.randn(2, 4, 8, 8)
    assert patches(x, layer.weight, (layer.stride, layer.padding, layer.dilation, layer.groups)) is None
    with WindowProducts():
        assert torch.equal(
            layer(x), F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        )


def test_rows_of_a_bank_are_stacked_without_a_copy() -> None:
    rows = torch.arange(40.0).view(4, 10)
    view = stacked([rows[k, 2:8].view(2, 3) for k in (0, 1, 2)])
    assert view.data_ptr() == rows[0, 2:].data_ptr()
    uneven, apart = [rows[k, 2:8].view(2, 3) for k in (0, 1, 3)], [torch.ones(2, 3), torch.zeros(2, 3)]
    for pieces in (uneven, apart, [rows[2, :6], rows[0, :6]]):
        assert torch.equal(stacked(pieces), torch.stack(pieces))
    assert torch.equal(view, torch.stack([rows[k, 2:8].view(2, 3) for k in range(3)]))


def test_what_is_foreseen_is_what_would_have_been_asked() -> None:
    bank = a_bank(expert_states(3))
    before, plain, ahead = Evidence(bank, a_batch(seed=1)), Evidence(bank, a_batch(seed=2)), Evidence(bank, a_batch(seed=2))
    for view in ("none", "contrast"):
        before.log_p(view)
    before.anchor_log_p("mean")
    ahead.foresee(before)
    run = ahead.forwards_run
    for view in ("none", "contrast"):
        torch.testing.assert_close(ahead.view_logits(view), plain.view_logits(view), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ahead.anchor_log_p("mean"), plain.anchor_log_p("mean"))
    assert ahead.forwards_run == run == plain.forwards_run == 2 * bank.K + 1


def test_on_a_cpu_nothing_is_recorded() -> None:
    recorded, asked = Recorded(), []

    def twice(x: Tensor) -> Tensor:
        asked.append(len(x))
        return 2 * x

    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(recorded("twice", twice, torch.ones(2)), torch.full((2,), 2.0))
    assert asked == [2, 2, 2]
    assert torch.equal(
        torch.stack(recorded.side_by_side([lambda: twice(torch.ones(1)), lambda: torch.zeros(1)])), torch.tensor([[2.0], [0.0]])
    )


def test_recording_is_off_as_long_as_somebody_listens_even_if_they_fail() -> None:
    recorded = Recorded()
    with pytest.raises(ValueError, match="of a listener"), recorded.off():
        assert recorded.refusal == "listened to"
        raise ValueError("of a listener")
    assert recorded.refusal == ""


@needs_a_gpu
def test_recorded_functions_give_the_same_bits_for_other_inputs() -> None:
    recorded = Recorded()
    with torch.no_grad():
        for seed in range(4):
            x = torch.randn(8, 4, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
            assert torch.equal(recorded("square", lambda x: x @ x.T, x), x @ x.T)


@needs_a_gpu
def test_a_function_that_waits_for_a_number_runs_as_it_is() -> None:
    recorded, x = Recorded(), torch.ones(4, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            assert float(recorded("waits", lambda x: x * float(x.sum()), x)[0]) == 4
        torch.randn(4, device="cuda")  # torch's generator is not left waiting
    assert recorded.refusal
