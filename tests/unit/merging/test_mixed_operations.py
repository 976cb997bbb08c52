"""Operations with parameters that differ between samples: attention, statistics, tables, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fedmerge.merging.per_sample.mixed_operations  # noqa: F401 - fills the table of operations
from fedmerge.errors import PerSampleRefused
from fedmerge.merging.per_sample.mixed_tensor import Mixed, per_sample
from tests.unit.merging.test_merged_first import activations, close, merged, mixed

E, HEADS, LENGTH, N = 8, 2, 5, 3
ALLOWED = torch.ones(LENGTH, LENGTH).tril().bool()


def attention(x: Tensor, parameters: dict[str, Any], **given: Any) -> Tensor:
    """x (L, N, E)."""
    biases = {"bias_k": None, "bias_v": None, "add_zero_attn": False, "dropout_p": 0.0, "training": False, "need_weights": False}
    return F.multi_head_attention_forward(x, x, x, E, HEADS, **biases, **parameters, **given)[0]


WHOLE = {"in_proj_weight": (3 * E, E), "in_proj_bias": (3 * E,), "out_proj_weight": (E, E), "out_proj_bias": (E,)}
APART = WHOLE | {f"{name}_proj_weight": (E, E) for name in "qkv"}


@pytest.mark.parametrize(
    ("shapes", "given"),
    [
        (WHOLE, {}),
        (WHOLE, {"attn_mask": ~ALLOWED}),
        (WHOLE, {"attn_mask": (~ALLOWED).double() * -5.0}),
        (WHOLE, {"attn_mask": (~ALLOWED).repeat(N * HEADS, 1, 1)}),
        (WHOLE, {"attn_mask": ~ALLOWED, "is_causal": True}),
        (APART, {"use_separate_proj_weight": True}),
    ],
    ids=["plain", "mask", "added mask", "mask of every head", "causal", "separate projections"],
)
def test_attention_has_each_samples_own_projections(shapes: dict[str, tuple[int, ...]], given: dict[str, Any]) -> None:
    parameters: dict[str, Any] = {name: mixed(shape, 3, N) for name, shape in shapes.items()}
    x = activations(LENGTH, N, E)
    if shapes is APART:
        parameters["in_proj_weight"] = None
    own = {name: [None] * N if value is None else merged(value) for name, value in parameters.items()}
    masks = [given.get("attn_mask")] * N
    if isinstance(masks[0], Tensor) and masks[0].ndim == 3:
        masks = [masks[0][:HEADS]] * N
    plain = [given | ({"attn_mask": mask} if mask is not None else {}) for mask in masks]
    wanted = [attention(x[:, i : i + 1], {name: value[i] for name, value in own.items()}, **plain[i]) for i in range(N)]
    close(attention(x, parameters, **given), torch.cat(wanted, 1))


def test_an_attention_bias_may_be_a_parameter() -> None:
    q, k, v = activations(3, N, HEADS, LENGTH, 4)
    bias = mixed((1, HEADS, LENGTH, LENGTH), 4, N)
    wanted = torch.cat(
        [F.scaled_dot_product_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], b) for i, b in enumerate(merged(bias))]
    )
    close(F.scaled_dot_product_attention(q, k, v, bias), wanted)
    close(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), wanted)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "weights of attention": (
        lambda: F.multi_head_attention_forward(
            *[activations(LENGTH, N, E)] * 3, E, HEADS, mixed((3 * E, E), 2, N), None, None, None, False, 0.0,
            mixed((E, E), 2, N), None, training=False, need_weights=True,
        ),
        "with weights, padding or added keys",
    ),
    "attention in training": (
        lambda: F.multi_head_attention_forward(
            *[activations(LENGTH, N, E)] * 3, E, HEADS, mixed((3 * E, E), 2, N), None, None, None, False, 0.5,
            mixed((E, E), 2, N), None, training=True, need_weights=False,
        ),
        "in training mode",
    ),
    "queries that are parameters": (
        lambda: F.scaled_dot_product_attention(mixed((1, 2, 4), 2, N), activations(N, 2, 4), activations(N, 2, 4)),
        "scaled_dot_product_attention",
    ),
    "batch statistics": (
        lambda: F.batch_norm(activations(N, 2, 4), mixed((2,), 2, N), mixed((2,), 2, N), training=True),
        "batch_norm in training mode",
    ),
    "a transposed convolution with computed weights": (
        lambda: F.conv_transpose1d(activations(N, 2, 4), mixed((2, 3, 3), 2, N).exp()),
        "conv_transpose1d",
    ),
    "more axes than the activations": (lambda: activations(N, 2) + mixed((1, 2, 2), 2, N), "broadcast"),
    "a first axis for the batch": (lambda: activations(N, 2) + mixed((3, 2), 2, N), "broadcast"),
    "an unknown operation": (lambda: torch.cdist(activations(N, 2, 4), mixed((2, 4), 2, N)), "cdist"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_exact_form_is_refused_by_name(case: str) -> None:
    run, said = REFUSED[case]
    with pytest.raises(PerSampleRefused, match=said):
        run()


def test_a_normalization_by_what_it_is_given_needs_no_statistics() -> None:
    x, gain, bias = activations(N, 4, 6), mixed((4,), 2, N), mixed((4,), 3, N)
    wanted = F.batch_norm(x, None, None, training=True) * merged(gain)[..., None] + merged(bias)[..., None]
    close(F.batch_norm(x, None, None, gain, bias, training=True), wanted)
    close(F.group_norm(x, 2, gain, bias), F.group_norm(x, 2) * merged(gain)[..., None] + merged(bias)[..., None])


def test_transposed_convolutions_are_sums_over_experts() -> None:
    weight, bias, x = mixed((4, 3, 2, 2), 3, N), mixed((3,), 3, N), activations(N, 4, 6, 6)
    wanted = [F.conv_transpose2d(x[i : i + 1], w, b, 2) for i, (w, b) in enumerate(zip(merged(weight), merged(bias), strict=True))]
    close(F.conv_transpose2d(x, weight, bias, 2), torch.cat(wanted))


TABLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda table, weight: F.linear(table, weight),
    "convolution": lambda table, weight: F.conv1d(table[None], weight[..., None]),
    "sum": lambda table, weight: weight + table[:1],
    "layer norm": lambda table, weight: F.layer_norm(weight, (5,), table[0]),
}


@pytest.mark.parametrize("case", TABLES)
def test_what_is_done_with_a_table_stays_a_parameter(case: str) -> None:
    """A table of the model has a first side that is no multiple of N."""
    table, weight = activations(5, 5)[:5], mixed((4, 5), 3, N)
    found = TABLES[case](table if case != "convolution" else activations(5, 7), weight)
    assert isinstance(found, Mixed)
    plain = activations(5, 7) if case == "convolution" else table
    close(per_sample(found), torch.stack([TABLES[case](plain, own) for own in merged(weight)]))
