"""Spherical interpolation: tensors are merged along the sphere instead of across it."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes, inner_products, tensorwise
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
    many: Literal["karcher", "tangent", "sequential"] = Field("karcher", description="the rule for three experts or more")
    of: Literal["theta", "tau"] = Field("theta", description="what is merged: parameters, or task vectors from theta_0")
    iterations: int = Field(10, ge=1, le=1000, description="most steps of the Karcher mean")
    tolerance: float = Field(1e-5, gt=0, description="length of a step at which the Karcher mean has converged, radians")

    @property
    def needed(self) -> frozenset[str]:
        """theta_0, for task vectors."""
        return frozenset({"theta_0"}) if self.of == "tau" else frozenset()

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        order = sorted(range(bank.K), key=lambda k: bank.names[k])  # by name, so that no order of sites matters
        theta_0 = bank.anchor_row("theta_0") if self.of == "tau" else None

        def one(name: str, theta: Tensor, out: Tensor) -> None:
            start = None if theta_0 is None else theta_0[bank.slices[name]].to(theta)
            G = inner_products(theta[:, None], None if start is None else start[None])[0]
            weights = theta.new_zeros(bank.K, dtype=torch.float64)
            weights[order] = self._weights(G[order][:, order])
            weighted_sum(theta, weights, out)
            if start is not None:
                out.add_(start, alpha=1 - float(weights.sum()))

        return tensorwise(bank, one)

    def working_bytes(self, sizes: Sizes) -> int:
        """One tensor of all experts, where they are on a disk or in shards."""
        return 4 * sizes.experts * sizes.largest

    def _weights(self, G: Tensor) -> Tensor:
        """What each vector counts (K,), given their inner products (K, K)."""
        K = len(G)
        if K == 1:
            return G.new_ones(1)
        if K > 2 and self.many != "sequential":
            return karcher_weights(G, 1 if self.many == "tangent" else self.iterations, self.tolerance)
        merged = torch.eye(K).to(G)[0]
        for j in range(1, K):
            pair = torch.stack([merged, torch.eye(K).to(G)[j]])
            merged = slerp_weights(pair @ G @ pair.T, self.t if K == 2 else 1 / (j + 1)) @ pair
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
    return slerp_weights(inner_products(pair[:, None])[0], t).to(a) @ pair


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
    return karcher_weights(inner_products(v[:, None])[0], iterations, tolerance).to(v) @ v


def slerp_weights(G: Tensor, t: float) -> Tensor:
    """Weights of two vectors in their spherical interpolation.

    Parameters
    ----------
    G : Tensor
        Their inner products (2, 2).
    t : float
        In [0, 1].

    Returns
    -------
    Tensor
        (2,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.slerp import slerp_weights
    >>> v = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> slerp_weights(v @ v.T, t=0.5)
    tensor([0.7071, 0.7071])
    """
    lengths = (G[0, 0] * G[1, 1]).sqrt()
    cos = (G[0, 1] / lengths).clamp(-1, 1) if lengths > 0 else G.new_ones(())
    if cos.abs() > NEARLY_PARALLEL:
        return G.new_tensor([1 - t, t])
    w = cos.acos()
    return torch.stack([torch.sin((1 - t) * w), torch.sin(t * w)]) / torch.sin(w)


def karcher_weights(G: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Weights of K vectors in their Karcher mean.

    u <- cos|T| u + sin|T| T/|T|, T = (1/K) sum_k (w_k / sin w_k)(u_k - cos w_k u), until |T| is small. u and T are sums of the u_k,
    so all lengths and angles follow from the cosines C: u = sum_k b_k u_k has cos w = C b. 1/K where the vectors cancel out.

    Parameters
    ----------
    G : Tensor
        Their inner products (K, K).
    iterations : int
        At most, at least 1.
    tolerance : float
        |T|, radians, at which it stops.

    Returns
    -------
    Tensor
        (K,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.slerp import karcher_weights
    >>> v = torch.eye(3)
    >>> karcher_weights(v @ v.T, iterations=10, tolerance=1e-5)
    tensor([0.5774, 0.5774, 0.5774])
    """
    K, lengths = len(G), G.diagonal().clamp(min=0).sqrt()
    if not bool((lengths > 0).all()):
        return G.new_full((K,), 1 / K)
    C = G / (lengths[:, None] * lengths)
    b = G.new_full((K,), 1 / K)
    if float(size := (b @ C @ b).clamp(min=0).sqrt()) < 1e-6:
        return b
    b = b / size
    for _ in range(iterations):
        cos = (C @ b).clamp(-1, 1)
        w = cos.acos()
        stretch = torch.where(w.sin() > 1e-6, w / w.sin().clamp(min=1e-12), 1.0)
        T = stretch / K - (stretch * cos).mean() * b
        step = (T @ C @ T).clamp(min=0).sqrt()
        if step < tolerance:
            break
        b = torch.cos(step) * b + torch.sin(step) * T / step
    return lengths.mean() * b / lengths
