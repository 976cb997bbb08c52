"""Spherical interpolation: tensors are merged along the sphere instead of across it."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes, tensorwise
from fedmerge.merging.methods._base import Static

NEARLY_PARALLEL = 0.9995
"""|cosine| above which the formula divides 0 by 0, and a straight line is as good."""


class Slerp(Static):
    """For every tensor, flattened: v = [sin((1-t) w) v_0 + sin(t w) v_1] / sin w, w the angle between v_0 and v_1.

    Two experts as in the paper, with t the share of the second; the vectors are not normalized, and nearly parallel ones are
    interpolated on a line. For K > 2: `karcher` is the mean on the sphere (mergekit), `tangent` its first step from the
    normalized mean, `sequential` folds one expert after another with t = 1/(j+1). Directions are merged on the sphere, and the
    length is the experts' mean length. Worked example: v_0 = (1, 0), v_1 = (0, 1), t = 0.5 give (0.7071, 0.7071).
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
        vectors = bank.taus if self.of == "tau" else bank.thetas
        merged = tensorwise(bank, lambda columns: vectors(columns, order), lambda _, v: self._one(v))
        return merged + bank.anchor_row("theta_0") if self.of == "tau" else merged

    def working_bytes(self, sizes: Sizes) -> int:
        """One tensor of all experts, and what the mean on the sphere makes of it."""
        return 6 * 4 * sizes.experts * sizes.largest

    def _one(self, v: Tensor) -> Tensor:
        """One tensor: (K, d) -> (d,)."""
        if len(v) == 1:
            return v[0]
        if len(v) == 2:
            return slerp(v[0], v[1], self.t)
        if self.many == "sequential":
            merged = v[0]
            for j in range(1, len(v)):
                merged = slerp(merged, v[j], 1 / (j + 1))
            return merged
        return karcher(v, 1 if self.many == "tangent" else self.iterations, self.tolerance)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From a (d,) at t = 0 to b (d,) at t = 1; on a line where the angle is nearly 0 or nearly half a turn."""
    lengths = a.norm() * b.norm()
    cos = (a @ b / lengths).clamp(-1, 1) if lengths > 0 else lengths.new_ones(())
    if cos.abs() > NEARLY_PARALLEL:
        return (1 - t) * a + t * b
    w = cos.acos()
    return (torch.sin((1 - t) * w) * a + torch.sin(t * w) * b) / torch.sin(w)


def karcher(v: Tensor, iterations: int, tolerance: float) -> Tensor:
    """The point of the sphere with the least sum of squared angles to v_k (K, d), at their mean length.

    u <- cos|T| u + sin|T| T/|T|, T = (1/K) sum_k (w_k / sin w_k)(u_k - cos w_k u), until |T| is small. The plain mean where the
    vectors cancel out.
    """
    lengths = v.norm(dim=1)
    u_k = v / lengths.clamp(min=torch.finfo(v.dtype).tiny)[:, None]
    start = u_k.mean(0)
    if start.norm() < 1e-6 or not bool((lengths > 0).all()):
        return v.mean(0)
    u = start / start.norm()
    for _ in range(iterations):
        cos = (u_k @ u).clamp(-1, 1)
        w = cos.acos()
        stretch = torch.where(w.sin() > 1e-6, w / w.sin().clamp(min=1e-12), 1.0)
        T = (stretch[:, None] * (u_k - cos[:, None] * u)).mean(0)
        step = T.norm()
        if step < tolerance:
            break
        u = torch.cos(step) * u + torch.sin(step) * T / step
    merged: Tensor = lengths.mean() * u
    return merged
