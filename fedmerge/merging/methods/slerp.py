"""Spherical interpolation: tensors are merged along the sphere instead of across it."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes, inner_products, neighbors
from fedmerge.merging.bank.row_storage import weighted_sum
from fedmerge.merging.methods._base import Static

NEARLY_PARALLEL = 0.9995
"""|cosine| above which the formula divides 0 by 0, and a straight line is as good."""


class Slerp(Static):
    """For every tensor, flattened: v = [sin((1-t) w) v_0 + sin(t w) v_1] / sin w, w the angle between v_0 and v_1.

    Two experts as in the paper, with t the share of the second; the vectors are not normalized, and nearly parallel ones are
    interpolated on a line. For K > 2: `karcher` is the mean on the sphere (mergekit), `tangent` its first step from the
    normalized mean, `sequential` folds one expert after another with t = 1/(j+1). Directions are merged on the sphere, and the
    length is the experts' mean length. A tensor's K x K inner products are all that it takes.
    Worked example: v_0 = (1, 0), v_1 = (0, 1), t = 0.5 give (0.7071, 0.7071).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> a, b = ({"weight": torch.tensor([row])} for row in ([1.0, 0.0], [0.0, 1.0]))
    >>> fedmerge.merge(model, [a, b], "slerp", t=0.5)["weight"]
    tensor([[0.7071, 0.7071]])
    """

    paper: ClassVar[str] = "Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; Karcher mean as in mergekit"

    t: float = Field(0.5, ge=0, le=1, description="share of the second of two experts, in the order of names")
    many: Literal["karcher", "tangent", "sequential"] = Field("karcher", description="rule for three experts or more")
    of: Literal["theta", "tau"] = Field("theta", description="what is merged: parameters, or task vectors from theta_0")
    iterations: int = Field(10, ge=1, le=1000, description="largest number of steps of the Karcher mean")
    tolerance: float = Field(1e-5, gt=0, description="length of a step at which the Karcher mean has converged, radians")

    @property
    def needed(self) -> frozenset[str]:
        """theta_0, for task vectors."""
        return frozenset({"theta_0"}) if self.of == "tau" else frozenset()

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        order = sorted(range(bank.K), key=lambda k: bank.names[k])  # by name, so that no order of sites matters
        theta_0 = bank.anchor_row("theta_0").to(bank.wide) if self.of == "tau" else None
        out = bank.blank(bank.wide)
        for names, rows, columns in neighbors(bank):
            at = [slice(bank.slices[name].start - columns.start, bank.slices[name].stop - columns.start) for name in names]
            start = None if theta_0 is None else theta_0[columns]
            G = torch.cat([inner_products(rows[:, None, one], None if start is None else start[None, one]) for one in at])
            weights = G.new_zeros(len(names), bank.K)
            weights[:, order] = self._weights(G[:, order][:, :, order])
            summands = list(rows)
            if start is not None:
                summands, weights = [*summands, start], torch.cat([weights, 1 - weights.sum(1, keepdim=True)], 1)
            for one, w in zip(at, weights, strict=True):
                weighted_sum([row[one] for row in summands], w, out[columns][one])
        return out

    def working_bytes(self, sizes: Sizes) -> int:
        """One tensor of all experts, where they are on a disk or in shards."""
        return 4 * sizes.experts * sizes.largest

    def _weights(self, G: Tensor) -> Tensor:
        """What each vector counts (R, K), given their inner products (R, K, K)."""
        K = G.shape[-1]
        if K == 1:
            return G.new_ones(len(G), 1)
        if K > 2 and self.many != "sequential":
            return karcher_weights(G, 1 if self.many == "tangent" else self.iterations, self.tolerance)
        one = torch.eye(K).to(G)
        merged = one[0].expand(len(G), K)
        for j in range(1, K):
            pair = torch.stack([merged, one[j].expand(len(G), K)], 1)
            merged = (slerp_weights(pair @ G @ pair.mT, self.t if K == 2 else 1 / (j + 1))[:, None] @ pair)[:, 0]
        return merged


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Spherical interpolation of two vectors; on a line where their angle is nearly 0 or nearly half a turn.

    Parameters
    ----------
    a : Tensor
        (d,), where t = 0.
    b : Tensor
        (d,), where t = 1.
    t : float
        In [0, 1].

    Returns
    -------
    Tensor
        (d,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.slerp import slerp
    >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    tensor([0.7071, 0.7071])
    """
    pair = torch.stack([a, b])
    return slerp_weights(inner_products(pair[:, None]), t)[0].to(a) @ pair


def karcher(v: Tensor, iterations: int, tolerance: float) -> Tensor:
    """The point of the sphere with the least sum of squared angles to K vectors, at their mean length.

    Parameters
    ----------
    v : Tensor
        (K, d).
    iterations : int
        At most, at least 1.
    tolerance : float
        Length of the step, radians, at which it stops.

    Returns
    -------
    Tensor
        (d,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.slerp import karcher
    >>> karcher(torch.eye(3), iterations=10, tolerance=1e-5)
    tensor([0.5774, 0.5774, 0.5774])
    """
    return karcher_weights(inner_products(v[:, None]), iterations, tolerance)[0].to(v) @ v


def slerp_weights(G: Tensor, t: float) -> Tensor:
    """Weights of two vectors in their spherical interpolation.

    Parameters
    ----------
    G : Tensor
        Their inner products, in each of R groups (R, 2, 2).
    t : float
        In [0, 1].

    Returns
    -------
    Tensor
        (R, 2).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.slerp import slerp_weights
    >>> v = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> slerp_weights((v @ v.T)[None], t=0.5)
    tensor([[0.7071, 0.7071]])
    """
    lengths = (G[:, 0, 0] * G[:, 1, 1]).sqrt()
    cos = torch.where(lengths > 0, G[:, 0, 1] / lengths, 1.0).clamp(-1, 1)
    line = cos.abs() > NEARLY_PARALLEL
    w = torch.where(line, 0.0, cos).acos()
    curved = torch.stack([torch.sin((1 - t) * w), torch.sin(t * w)], 1) / torch.sin(w)[:, None]
    return torch.where(line[:, None], G.new_tensor([1 - t, t]), curved)


def karcher_weights(G: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Weights of K vectors in their Karcher mean, for R groups at once.

    u <- cos|T| u + sin|T| T/|T|, T = (1/K) sum_k (w_k / sin w_k)(u_k - cos w_k u), until |T| is small. u and T are sums of the u_k,
    so all lengths and angles follow from the cosines C: u = sum_k b_k u_k has cos w = C b. 1/K where the vectors cancel out.

    Parameters
    ----------
    G : Tensor
        Their inner products (R, K, K).
    iterations : int
        At most, at least 1.
    tolerance : float
        |T|, radians, at which a group stops.

    Returns
    -------
    Tensor
        (R, K).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.slerp import karcher_weights
    >>> v = torch.eye(3)
    >>> karcher_weights((v @ v.T)[None], iterations=10, tolerance=1e-5)
    tensor([[0.5774, 0.5774, 0.5774]])
    """
    K, lengths = G.shape[-1], G.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    C = G / (lengths[:, :, None] * lengths[:, None]).clamp(min=torch.finfo(G.dtype).tiny)
    b = G.new_full(lengths.shape, 1 / K)
    size = _norm(b, C)
    plain = (size < 1e-6) | (lengths <= 0).any(1, keepdim=True)
    b = torch.where(plain, b, b / size)
    moving = ~plain
    for _ in range(iterations):
        cos = (C @ b[:, :, None])[:, :, 0].clamp(-1, 1)
        w = cos.acos()
        stretch = torch.where(w.sin() > 1e-6, w / w.sin().clamp(min=1e-12), 1.0)
        T = stretch / K - (stretch * cos).mean(1, keepdim=True) * b
        step = _norm(T, C)
        moving = moving & (step >= tolerance)
        if not bool(moving.any()):
            break
        b = torch.where(moving, torch.cos(step) * b + torch.sin(step) * T / step, b)
    return torch.where(plain, b, lengths.mean(1, keepdim=True) * b / lengths)


def _norm(b: Tensor, C: Tensor) -> Tensor:
    """Lengths (R, 1) of sums with weights b (R, K), given inner products C (R, K, K) of what is summed."""
    return (b[:, None] @ C @ b[:, :, None])[:, :, 0].clamp(min=0).sqrt()
