"""What models do with their parameters, done with parameters that differ between samples: the table of `mixed.Mixed`.

x stands for activations (N m, ...): N samples, each with m windows that follow each other. An operation is given torch's
function (func), its positional arguments, and those by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmerge.merging.bank.patches import patches
from fedmerge.merging.bank.recorded import recording
from fedmerge.merging.per_sample.merged_first import can_merge_first, merges_first, own_convolution, own_product
from fedmerge.merging.per_sample.mixed_tensor import (
    TABLE,
    Mixed,
    aligned,
    count,
    for_every_sample,
    mixed_in,
    per_sample,
    refuse_operation,
    stacked,
)


def _shape_only(func: Any, args: Any, kwargs: Any) -> Any:
    """Views, slices and copies: linear, so the pieces can be viewed and the sum stays uncomputed."""
    mixed = args[0]
    if not isinstance(mixed, Mixed) or mixed.merged is not None or len(mixed_in((args, kwargs))) > 1:
        return for_every_sample(func, func.__name__, args, kwargs, constants=True)
    pieces = [func(piece, *args[1:], **kwargs) for piece in mixed.pieces]
    if isinstance(pieces[0], tuple | list):
        return tuple(Mixed.linear(list(part), _weights(mixed), mixed.owners, mixed.used) for part in zip(*pieces, strict=True))
    return Mixed.linear(pieces, _weights(mixed), mixed.owners, mixed.used)


def _expand(func: Any, args: Any, kwargs: Any) -> Any:
    """A token repeated for the batch becomes activations, each sample's own; any other expansion is a view."""
    mixed, sizes = args[0], args[1:]
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if mixed.shape[0] == 1 and sizes[0] == count(mixed) and len(sizes) == mixed.ndim:
        values = per_sample(mixed)[:, 0]
        return func(values, -1, *sizes[1:]) if func.__name__ == "expand" else func(values, 1, *sizes[1:])
    return _shape_only(func, args, kwargs)


def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    """x W_i^T + b_i."""
    x, weight, bias, *_ = _operands(args, kwargs)
    if _is_constant(x, weight, bias):
        return for_every_sample(func, "linear", args, kwargs, constants=True)
    if isinstance(weight, Mixed):
        rows = x.reshape(count(weight), -1, x.shape[-1])
        weight.used.update(weight.owners)
        if weight.merged is not None:
            out = torch.bmm(rows, weight.merged.transpose(1, 2))
        elif merges_first(weight, rows.shape[1]):
            out = own_product(weight, rows, rows.new_empty(*rows.shape[:2], weight.shape[0]))
        else:
            out = _sum_of_products(rows, weight)
        out = out.reshape(*x.shape[:-1], -1)
    else:
        out = F.linear(x, weight)
    return out if bias is None else out.add_(aligned(bias, out) if isinstance(bias, Mixed) else bias)


def _matmul(func: Any, args: Any, kwargs: Any) -> Any:
    """x W_i, W (d, outputs); a product of two parameters is merged first."""
    x, weight = args
    if isinstance(weight, Mixed) and not isinstance(x, Mixed) and weight.ndim == 2 and not _is_constant(x, weight):
        return _linear(F.linear, (x, weight.transpose(0, 1)), {})
    return for_every_sample(func, func.__name__, args, kwargs)


def _convolution(func: Any, args: Any, kwargs: Any) -> Any:
    """conv(x, w_i) + b_i: a sum of convolutions of scaled activations, or one grouped convolution with merged filters."""
    x, weight, bias, rest, named = _operands(args, kwargs)
    if _is_constant(x, weight, bias):
        return for_every_sample(func, func.__name__, args, kwargs, constants=True)
    if not isinstance(weight, Mixed):
        out = func(x, weight, None, *rest, **named)
    elif weight.merged is not None:
        out = _grouped(func, x, weight, rest, named)
    elif (found := own_convolution(func, x, weight, rest, named)) is not None:
        out = found
    elif x.is_cuda and func is torch.conv2d and not named and (found := patches(x, weight, rest)) is not None:
        flat = Mixed.linear([piece.flatten(1) for piece in weight.pieces], _weights(weight), weight.owners, weight.used)
        return _linear(F.linear, (found, flat, bias), {}).permute(0, 3, 1, 2)
    else:
        weight.used.update(weight.owners)
        shares = _weights(weight).to(x.dtype).repeat_interleave(len(x) // count(weight), 0)
        scaled = (x * share.view(-1, *[1] * (x.ndim - 1)) for share in shares.T)
        out = sum(func(part, w, None, *rest, **named) for part, w in zip(scaled, weight.pieces, strict=True))
    return out if bias is None else _per_channel(Tensor.add_, out, bias)


def _mixed_normalization(plain: Callable[..., Tensor], names: tuple[str, ...], by_channel: bool) -> Callable[[Any, Any, Any], Any]:
    """A normalization without parameters, and then a gain and a bias for every sample. names: the function's arguments."""

    def handle(func: Any, args: Any, kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, weight, bias = given.pop("input"), given.pop("weight", None), given.pop("bias", None)
        if isinstance(x, Mixed):
            return for_every_sample(func, func.__name__, args, kwargs, constants=True)
        x = plain(x, **given)  # new memory, so that gain and bias may be put into it
        for apply, parameter in ((Tensor.mul_, weight), (Tensor.add_, bias)):
            if parameter is not None and by_channel:
                x = _per_channel(apply, x, parameter)
            elif parameter is not None:
                x = apply(x, aligned(parameter, x) if isinstance(parameter, Mixed) else parameter)
        return x

    return handle


def _check_variance(variance: Any, eps: float) -> None:
    if isinstance(variance, Mixed) and not bool((per_sample(variance) + eps > 0).all()):
        raise refuse_operation("batch_norm of a variance that is not positive", [variance])


def _batch_statistics(x: Tensor, **given: Any) -> Tensor:
    """(x - mean_i) / sqrt(var_i + eps): statistics are merged for every sample before the division, which is not linear."""
    mean, variance = given["running_mean"], given["running_var"]
    if given.get("training") and mean is not None:
        raise refuse_operation("batch_norm in training mode", (mean, variance))
    if mean is None:
        return F.batch_norm(x, None, None, None, None, True, 0.0, given.get("eps", 1e-5))
    if not recording(x):
        _check_variance(variance, given.get("eps", 1e-5))
    scale = (variance + given.get("eps", 1e-5)).rsqrt()
    return _per_channel(Tensor.mul_, _per_channel(torch.sub, x, mean), scale)


def _batch_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """On a CPU one pass of torch's own kernel, in which every sample's channels are channels of their own; else step by step."""
    given = {**dict(zip(BATCH_NORM, args, strict=False)), **kwargs}
    x, mean, variance, eps = given["input"], given["running_mean"], given["running_var"], given.get("eps", 1e-5)
    alone = isinstance(x, Mixed) or mean is None or variance is None or given.get("training")
    if alone or not can_merge_first(x) or not x.is_contiguous():
        return STEP_BY_STEP(func, args, kwargs)
    _check_variance(variance, eps)
    flat = x.reshape(len(x), x.shape[1], -1)
    gain, bias = (None if given.get(name) is None else _of_all(given[name], flat[..., 0]) for name in ("weight", "bias"))
    mean, variance = _of_all(mean, flat[..., 0]), _of_all(variance, flat[..., 0])
    return F.batch_norm(flat.view(1, -1, flat.shape[2]), mean, variance, gain, bias, False, 0.0, eps).view(x.shape)


def _of_all(parameter: Tensor, like: Tensor) -> Tensor:
    """A parameter of channels for all samples, one after the other, like (N m, channels)."""
    fit = aligned(parameter, like) if isinstance(parameter, Mixed) else parameter
    return fit.expand(like.shape).reshape(-1).to(like.dtype)


def _elementwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Addition, multiplication and their like: of activations with parameters, or of parameters and tables alone."""
    mixed = mixed_in((args, kwargs))
    plain = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor) and not isinstance(item, Mixed)]
    data = [item for item in plain if item.ndim and item.shape[0] % count(mixed[0]) == 0]
    if not data:
        return for_every_sample(func, func.__name__, args, kwargs, constants=True)
    like = max(data, key=lambda item: (item.ndim, item.shape[0]))
    fit = {id(item): aligned(item, like) for item in mixed}
    return func(*(fit.get(id(item), item) for item in args), **{key: fit.get(id(item), item) for key, item in kwargs.items()})


def _attention(func: Any, args: Any, kwargs: Any) -> Any:
    """softmax(q k^T + bias_i) v with a bias that is a parameter."""
    q, mask = args[0], args[3] if len(args) > 3 else kwargs.get("attn_mask")
    if not isinstance(mask, Mixed) or len(mixed_in((args, kwargs))) > 1:
        raise refuse_operation("scaled_dot_product_attention", (args, kwargs))
    fit = aligned(mask, q).to(q.dtype)
    return func(*args[:3], fit, *args[4:], **kwargs) if len(args) > 3 else func(*args, **{**kwargs, "attn_mask": fit})


def _multi_head_attention(func: Any, args: Any, kwargs: Any) -> Any:
    """Attention of `nn.MultiheadAttention`, whose activations are (L, N, E): every sample's projections, then the rest."""
    given = {**dict(zip(ATTENTION, args, strict=False)), **kwargs}
    odd = ("bias_k", "bias_v", "static_k", "static_v", "key_padding_mask")
    if given.get("need_weights", True) or given.get("add_zero_attn") or any(given.get(name) is not None for name in odd):
        raise refuse_operation("multi_head_attention_forward with weights, padding or added keys", (args, kwargs))
    if given.get("training") and given.get("dropout_p", 0):
        raise refuse_operation("multi_head_attention_forward in training mode", (args, kwargs))
    sides = [given[name].transpose(0, 1) for name in ("query", "key", "value")]
    if given["in_proj_weight"] is not None and not given.get("use_separate_proj_weight"):
        weights = given["in_proj_weight"].chunk(3)
    else:
        weights = tuple(given[f"{name}_proj_weight"] for name in "qkv")
    biases = given["in_proj_bias"].chunk(3) if given["in_proj_bias"] is not None else (None,) * 3
    heads = given["num_heads"]
    q, k, v = (
        F.linear(side, weight, bias).reshape(*side.shape[:2], heads, -1).transpose(1, 2)
        for side, weight, bias in zip(sides, weights, biases, strict=True)
    )
    mask = given.get("attn_mask")
    if isinstance(mask, Tensor) and mask.ndim == 3:
        mask = mask.view(len(q), heads, *mask.shape[1:])
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = ~mask  # True is "not allowed" there, and "allowed" here
    causal = bool(given.get("is_causal")) and mask is None
    found = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2).flatten(2)
    return F.linear(found, given["out_proj_weight"], given["out_proj_bias"]).transpose(0, 1), None


def _prelu(func: Any, args: Any, kwargs: Any) -> Any:
    """x where positive, slope_i x elsewhere."""
    x, slope = args
    return torch.where(x >= 0, x, _per_channel(torch.mul, x, slope) if slope.numel() > 1 else x * aligned(slope, x))


def _sum_of_products(x: Tensor, weight: Mixed) -> Tensor:
    """sum_r (lambda_r x) W_r^T for x (N, L, d), accumulated in float32 or wider: (N, L, outputs)."""
    if x.is_cuda and x.dtype.itemsize == HALF:
        shares = _weights(weight).T[:, :, None, None].to(x)
        scaled = (shares * x).flatten(1, 2)  # (R, N L, d)
        found = torch.bmm(scaled, stacked(weight.pieces).transpose(1, 2), out_dtype=torch.float32)
        return found.sum(0).reshape(len(x), -1, found.shape[-1]).to(x.dtype)
    wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    total: Tensor | None = None
    for piece, share in zip(weight.pieces, _weights(weight).to(wide).T, strict=True):
        scaled = (x.to(wide) * share[:, None, None]).reshape(-1, x.shape[-1])
        W = piece.to(wide).T
        total = scaled @ W if total is None else total.addmm_(scaled, W)
    assert total is not None
    return total.reshape(len(x), -1, total.shape[-1]).to(x.dtype)


HALF = 2
"""Bytes of a number for which a GPU multiplies fast, and sums in float32."""


def _grouped(func: Any, x: Tensor, weight: Mixed, rest: Any, named: dict[str, Any]) -> Tensor:
    """One convolution in which every sample is a group of its own."""
    values, N = per_sample(weight), len(x)
    given = {**dict(zip(("stride", "padding", "dilation", "groups"), rest, strict=False)), **named}
    given["groups"] = given.get("groups", 1) * N
    if len(values) != N or "transpose" in func.__name__:
        raise refuse_operation(func.__name__, [weight])
    out = func(x.reshape(1, -1, *x.shape[2:]), values.flatten(0, 1), None, **given)
    return cast(Tensor, out.reshape(N, -1, *out.shape[2:]))


def _per_channel(apply: Any, x: Tensor, parameter: Any) -> Tensor:
    """apply(x, parameter) along the channels of x (N m, channels, ...); the parameter is (channels,), mixed or not."""
    flat = x if x.ndim == 2 else x.flatten(2)[..., 0]
    fit = aligned(parameter, flat) if isinstance(parameter, Mixed) else parameter[None]
    return cast(Tensor, apply(x, fit.reshape(*fit.shape, *[1] * (x.ndim - 2))))


def _operands(args: Any, kwargs: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    named = dict(kwargs)
    got = [args[i] if i < len(args) else named.pop(key, None) for i, key in enumerate(("input", "weight", "bias"))]
    return got[0], got[1], got[2], args[3:], named


def _is_constant(x: Tensor, *parameters: Any) -> bool:
    """Whether an operand is a table of the model and not the batch: its first side is not a multiple of N."""
    mixed = next(item for item in (x, *parameters) if isinstance(item, Mixed))
    return isinstance(x, Mixed) or x.shape[0] % count(mixed) != 0


def _weights(mixed: Mixed) -> Tensor:
    assert mixed.weights is not None
    return mixed.weights


LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps")
ATTENTION = (
    "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
    "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias",
)  # fmt: skip
GROUP_NORM = ("input", "num_groups", "weight", "bias", "eps")
RMS_NORM = ("input", "normalized_shape", "weight", "eps")
BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
STEP_BY_STEP = _mixed_normalization(_batch_statistics, BATCH_NORM, by_channel=True)


def _fill(names: str, how: Callable[[Any, Any, Any], Any]) -> None:
    TABLE.update(dict.fromkeys(names.split(), how))


_fill("view reshape permute transpose swapaxes movedim unsqueeze squeeze flatten unflatten contiguous __getitem__ t", _shape_only)
_fill("to float double half bfloat16 type type_as clone detach neg chunk split unbind narrow", _shape_only)
_fill(
    "add sub mul div true_divide add_ sub_ mul_ div_ rsub addcmul where subtract multiply divide maximum minimum lerp", _elementwise
)
_fill("__radd__ __rsub__ __rmul__ __rtruediv__ __rdiv__ __rpow__", _elementwise)
_fill("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", _convolution)
_fill("expand repeat", _expand)
_fill("matmul __matmul__ mm", _matmul)
TABLE |= {
    "linear": _linear,
    "layer_norm": _mixed_normalization(lambda x, **given: F.layer_norm(x, **given), LAYER_NORM, by_channel=False),
    "rms_norm": _mixed_normalization(lambda x, **given: F.rms_norm(x, **given), RMS_NORM, by_channel=False),
    "group_norm": _mixed_normalization(lambda x, **given: F.group_norm(x, **given), GROUP_NORM, by_channel=True),
    "batch_norm": _batch_norm,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head_attention,
    "prelu": _prelu,
    "cat": lambda func, args, kwargs: for_every_sample(func, "cat", args, kwargs, constants=True),
    "interpolate": lambda func, args, kwargs: for_every_sample(func, "interpolate", args, kwargs),
}
