"""Layers whose weights are merged for every sample first: against explicit merges in float64, over shapes and arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fedmerge.merging.per_sample.mixed_operations  # noqa: F401 - fills the table of operations
from fedmerge.errors import PerSampleRefused
from fedmerge.merging.per_sample.merged_first import BLOCK, GATHERED, merges_first, own_convolution
from fedmerge.merging.per_sample.mixed_tensor import Mixed


def mixed(shape: tuple[int, ...], experts: int, n: int, dtype: torch.dtype = torch.float64) -> Mixed:
    """A parameter whose pieces are views into rows, as those of a bank are."""
    generator = torch.Generator().manual_seed(sum(shape) + experts)
    size = torch.Size(shape).numel()
    rows = torch.randn(experts, size + 3, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(n, experts, generator=generator, dtype=torch.float64)
    pieces = [row[1 : size + 1].view(shape) for row in rows]
    return Mixed.linear(pieces, weights / weights.sum(1, keepdim=True), ("weight",), set())


def merged(parameter: Mixed) -> Tensor:
    assert parameter.weights is not None
    return torch.einsum("nr,r...->n...", parameter.weights, torch.stack(parameter.pieces).double())


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= 1e-12 * float(wanted.norm())


def activations(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


CONVOLUTIONS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "one pixel": (F.conv2d, (6, 4, 1, 1), (4, 7, 7), {}),
    "one pixel, stride": (F.conv2d, (6, 4, 1, 1), (4, 15, 15), {"stride": 2}),
    "one pixel, few of them": (F.conv2d, (6, 4, 1, 1), (4, 3, 4), {}),
    "one pixel, padding": (F.conv2d, (6, 4, 1, 1), (4, 11, 11), {"padding": 1}),
    "one pixel of a volume": (F.conv3d, (6, 4, 1, 1, 1), (4, 3, 3, 4), {}),
    "one step of a sequence": (F.conv1d, (6, 4, 1), (4, 40), {}),
    "patches": (F.conv2d, (5, 3, 4, 4), (3, 40, 40), {"stride": 4}),
    "patches of two sides": (F.conv2d, (5, 3, 2, 4), (3, 20, 40), {"stride": (2, 4)}),
    "windows of a small output": (F.conv2d, (5, 3, 3, 3), (3, 6, 6), {"padding": 1}),
    "windows of a large output": (F.conv2d, (5, 3, 3, 3), (3, 12, 12), {"padding": 1}),
    "stride and dilation": (F.conv2d, (5, 3, 3, 3), (3, 30, 30), {"padding": (2, 1), "stride": (1, 2), "dilation": 2}),
    "padding same": (F.conv2d, (5, 3, 3, 3), (3, 12, 12), {"padding": "same"}),
    "padding same, uneven, small": (F.conv2d, (5, 3, 4, 2), (3, 6, 6), {"padding": "same"}),
    "padding same, uneven, large": (F.conv2d, (5, 3, 4, 2), (3, 12, 12), {"padding": "same"}),
    "padding valid": (F.conv2d, (5, 3, 3, 3), (3, 14, 14), {"padding": "valid"}),
    "each channel": (F.conv2d, (4, 1, 3, 3), (4, 6, 6), {"padding": 1, "groups": 4}),
    "each channel, stride": (F.conv2d, (8, 1, 5, 5), (4, 9, 9), {"padding": 2, "stride": 2, "groups": 4}),
    "groups": (F.conv2d, (6, 2, 3, 3), (4, 12, 12), {"padding": 1, "groups": 2}),
    "windows of a sequence": (F.conv1d, (6, 4, 3), (4, 120), {"padding": 1}),
    "windows of a volume": (F.conv3d, (3, 2, 3, 3, 3), (2, 6, 6, 6), {"padding": 1}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_with_merged_weights_is_each_samples_own(case: str) -> None:
    convolve, shape, sides, arguments = CONVOLUTIONS[case]
    weight, x = mixed(shape, 8, 3), activations(3, *sides)
    found = own_convolution(convolve, x, weight, (), arguments)
    assert found is not None
    close(found, torch.cat([convolve(x[i : i + 1], w, **arguments) for i, w in enumerate(merged(weight))]))
    assert weight.used == {"weight"}
    if len(sides) == 3:
        turned = own_convolution(convolve, x.to(memory_format=torch.channels_last), weight, (), arguments)
        assert turned is not None
        close(turned, found)


def test_a_kernel_of_one_pixel_keeps_channels_last() -> None:
    x = activations(3, 4, 7, 7).to(memory_format=torch.channels_last)
    found = own_convolution(F.conv2d, x, mixed((6, 4, 1, 1), 8, 3), (), {})
    assert found is not None
    assert found.is_contiguous(memory_format=torch.channels_last)


@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    how=st.tuples(st.integers(1, 4), st.integers(0, 2), st.integers(1, 2), st.sampled_from([1, 2, 4])),
    side=st.tuples(st.integers(7, 13), st.integers(7, 13)),
    experts=st.integers(1, 5),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_layer_is_each_samples_own_whichever_way_it_takes(
    kernel: tuple[int, int], how: tuple[int, int, int, int], side: tuple[int, int], experts: int, bias: bool
) -> None:
    """how: stride, padding, dilation and groups."""
    weight, x = mixed((8, 4 // how[3], *kernel), experts, 3), activations(3, 4, *side)
    offset = mixed((8,), experts, 3) if bias else None
    found = F.conv2d(x, weight, offset, *how)
    own = zip(merged(weight), [None] * 3 if offset is None else merged(offset), strict=True)
    close(found, torch.cat([F.conv2d(x[i : i + 1], w, b, *how) for i, (w, b) in enumerate(own)]))


@pytest.mark.parametrize("tokens", [1, 9, 17])
@pytest.mark.parametrize("experts", [1, 2, 8])
def test_a_linear_layer_is_each_samples_own(tokens: int, experts: int) -> None:
    weight, bias, x = mixed((5, 6), experts, 4), mixed((5,), experts, 4), activations(4, tokens, 6)
    wanted = torch.stack([F.linear(x[i], w, b) for i, (w, b) in enumerate(zip(merged(weight), merged(bias), strict=True))])
    close(F.linear(x, weight, bias), wanted)
    close(F.linear(x.reshape(4 * tokens, 6), weight, bias), wanted.reshape(-1, 5))  # windows of each sample
    close(x @ weight.transpose(0, 1), wanted - merged(bias)[:, None])  # pieces that are not contiguous


def test_weights_larger_than_a_block_are_merged_block_by_block() -> None:
    inputs, outputs = 1000, BLOCK // 1000 + 70
    weight, x = mixed((outputs, inputs), 3, 2), activations(2, 20, inputs)
    close(F.linear(x, weight), torch.stack([F.linear(x[i], w) for i, w in enumerate(merged(weight))]))
    kernels, images = mixed((96, 96, 3, 3), 8, 5), activations(5, 96, 9, 9)
    assert 5 * kernels.numel() > BLOCK  # more than one part of the batch
    assert images.shape[2] ** 2 > GATHERED
    close(
        F.conv2d(images, kernels, padding=1),
        torch.cat([F.conv2d(images[i : i + 1], w, padding=1) for i, w in enumerate(merged(kernels))]),
    )


def test_the_choice_follows_shapes_experts_and_precision() -> None:
    assert merges_first(mixed((4, 4), 3, 2), uses=11)
    assert not merges_first(mixed((4, 4), 3, 2), uses=10)
    assert not merges_first(mixed((4, 4), 1, 2), uses=10**6)  # a sum of one
    assert not merges_first(mixed((4, 4), 3, 2, torch.bfloat16), uses=100)
    assert not merges_first(Mixed.computed(torch.zeros(2, 4, 4), ("weight",), set()), uses=100)
    dense, by_channel = mixed((4, 4, 3, 3), 3, 2), mixed((4, 1, 3, 3), 3, 2)
    assert own_convolution(F.conv2d, activations(2, 4, 3, 3), dense, (), {"padding": 1}) is None
    assert own_convolution(F.conv2d, activations(2, 4, 3, 3), by_channel, (), {"padding": 1, "groups": 4}) is not None
    assert own_convolution(F.conv_transpose2d, activations(2, 4, 30, 30), dense, (), {}) is None
    assert own_convolution(F.conv2d, activations(4, 4, 30, 30), dense, (), {}) is None  # two windows of each sample


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("sides", [(), (5,), (4, 5)])
def test_batch_norm_has_each_samples_own_statistics(sides: tuple[int, ...], affine: bool) -> None:
    x, mean, variance = activations(6, 3, *sides), mixed((3,), 4, 3), mixed((3,), 4, 3)
    variance.pieces = [piece.abs() + 0.1 for piece in variance.pieces]
    gain, bias = (mixed((3,), 2, 3), mixed((3,), 3, 3)) if affine else (None, None)
    own = [[None] * 3 if one is None else [*merged(one)] for one in (mean, variance, gain, bias)]
    wanted = torch.cat([F.batch_norm(part, *(one[i] for one in own)) for i, part in enumerate(x.split(2))])  # type: ignore[arg-type]
    close(F.batch_norm(x, mean, variance, gain, bias), wanted)
    if len(sides) == 2:  # step by step
        close(F.batch_norm(x.to(memory_format=torch.channels_last), mean, variance, gain, bias), wanted)


def test_batch_norm_refuses_a_variance_that_is_not_positive() -> None:
    for x in (activations(3, 3, 4, 4), activations(3, 3, 4, 4).to(memory_format=torch.channels_last)):
        variance = mixed((3,), 4, 3)
        variance.pieces = [-piece.abs() - 1 for piece in variance.pieces]
        with pytest.raises(PerSampleRefused, match="variance that is not positive"):
            F.batch_norm(x, mixed((3,), 4, 3), variance)


def test_what_a_sample_gets_is_not_written_into_the_activations() -> None:
    """Gains and biases go into new memory, never into what the model may still hold."""
    x, gain, bias = activations(3, 4, 5), mixed((5,), 3, 3), mixed((5,), 2, 3)
    before = x.clone()
    close(F.layer_norm(x, (5,), gain, bias), F.layer_norm(x, (5,)) * merged(gain)[:, None] + merged(bias)[:, None])
    F.linear(x, torch.eye(5, dtype=x.dtype), bias)
    F.linear(x, mixed((5, 5), 3, 3), nn.Parameter(torch.ones(5, dtype=x.dtype), requires_grad=False))
    assert torch.equal(x, before)


def test_a_parameter_is_where_its_pieces_are() -> None:
    assert mixed((2, 2), 3, 2).device.type == "cpu"


def test_a_single_number_may_be_a_parameter() -> None:
    scale, x = mixed((), 3, 4), activations(4, 5)
    close(x * scale.exp(), x * merged(scale).exp()[:, None])
