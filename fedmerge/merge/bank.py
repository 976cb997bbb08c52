"""K experts as one flat matrix: encoder columns first, head columns last, and any of them, or a mixture, as a running model.

A linear merge is one matrix-vector product for each part, written in place. No copy of the weights is made per batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmerge.errors import CheckpointError
from fedmerge.merge.buffers import Buffers
from fedmerge.merge.parts import Parts, StateDict, check_state

CONVEX_TOLERANCE = 1e-4


class Bank:
    """Experts theta (K, P) with base theta_0 (P,) or None, the model they run in, and what their owners declared.

    names: experts' names. counts: training images of each, or None. temperatures: (K,), 1 where none was fitted.
    flips: whether a horizontal flip preserves the label. encoder, head: slices of the P columns.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Parts,
        theta: Tensor,
        buffers: Buffers,
        names: Sequence[str],
        base: Tensor | None = None,
    ) -> None:
        self.model, self.parts, self.theta, self.base, self.buffers = model, parts, theta, base, buffers
        self.names = tuple(names)
        self.K, self.P = theta.shape
        self.shapes = {name: model.get_parameter(name).shape for name in (*parts.encoder, *parts.head)}
        width = sum(self.shapes[name].numel() for name in parts.encoder)
        self.encoder, self.head = slice(0, width), slice(width, self.P)
        self.counts: tuple[int, ...] | None = None
        self.temperatures = torch.ones(self.K, dtype=theta.dtype, device=theta.device)
        self.flips = False
        self._experts = [self._views(row) | buffers.of_expert(k) for k, row in enumerate(theta)]
        self._merged = torch.empty_like(theta[0])

    @staticmethod
    def of(  # noqa: PLR0913 - all but the experts have defaults
        model: nn.Module,
        experts: Sequence[StateDict] | Mapping[str, StateDict],
        base: StateDict | None = None,
        *,
        counts: Sequence[int] | None = None,
        temperatures: Sequence[float] | None = None,
        flips: bool = False,
        head: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        variance: str = "linear",
    ) -> Bank:
        """A bank of state dicts that fit `model`. `variance` is the buffer policy: "linear" or "moment".

        Raises CheckpointError if there is no expert, or one does not fit the model or holds a NaN.
        """
        named = dict(experts) if isinstance(experts, Mapping) else {f"expert-{k}": x for k, x in enumerate(experts)}
        if not named:
            raise CheckpointError("found no expert; expected at least one")
        wanted = model.state_dict()
        for name, state in [*named.items(), *([("the base", base)] if base is not None else [])]:
            check_state(state, wanted, name)
        parts = Parts.of(model, head)
        states = list(named.values())
        theta = torch.stack([flatten(state, parts, device, dtype) for state in states])
        flat_base = flatten(base, parts, device, dtype) if base is not None else None
        buffers = Buffers.of(states, base, parts, theta, variance)
        skeleton = copy.deepcopy(model).to(device=device, dtype=dtype).eval().requires_grad_(False)
        bank = Bank(skeleton, parts, theta, buffers, tuple(named), flat_base)
        bank.flips = flips
        if counts is not None:
            bank.counts = tuple(counts)
        if temperatures is not None:
            bank.temperatures = torch.as_tensor(temperatures, dtype=dtype, device=theta.device)
        return bank

    @property
    def merge_bytes(self) -> int:
        """Memory traffic of one linear merge: read K rows, write one."""
        return (self.K + 1) * self.P * self.theta.element_size()

    def mix(self, encoder: Tensor, head: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """theta (P,) = (sum_k encoder_k phi_k, sum_k head_k w_k), written into `out` or the bank's own buffer.

        encoder, head: (K,); head defaults to encoder. A one-hot row returns that expert bit for bit, and an expert with
        coefficient 0 is not read, so that a broken one cannot spoil the others.
        """
        out = self._merged if out is None else out
        for part, weights in ((self.encoder, encoder), (self.head, encoder if head is None else head)):
            weighted_sum(self.theta[:, part], weights, out[part])
        return out

    def forward(self, theta: Tensor, batch: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """Logits (N, C) of the model with parameters theta (P,) on a batch (N, channels, H, W).

        coefficients: (K,) convex weights for the BatchNorm statistics; default 1/K each.
        """
        return self._run(self._views(theta) | self.buffers.merged(coefficients), batch)

    def expert_logits(self, batch: Tensor) -> Tensor:
        """Logits (K, N, C) of every expert on a batch (N, channels, H, W)."""
        return torch.stack([self._run(state, batch) for state in self._experts])

    def state_dict(self, theta: Tensor, coefficients: Tensor | None = None) -> dict[str, Tensor]:
        """theta (P,) as a state dict that `model.load_state_dict` accepts, buffers included; a copy."""
        state = self._views(theta) | self.buffers.merged(coefficients)
        return {name: state[name].clone() for name in self.model.state_dict()}

    def _views(self, theta: Tensor) -> dict[str, Tensor]:
        pieces = torch.split(theta, [shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def _run(self, state: dict[str, Tensor], batch: Tensor) -> Tensor:
        logits: Any = functional_call(self.model, state, (batch.to(self.theta.dtype),))
        return logits  # type: ignore[no-any-return]


def flatten(state: StateDict, parts: Parts, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
    """The parameters of a state dict as one row (P,), encoder first."""
    names = (*parts.encoder, *parts.head)
    return torch.cat([state[name].detach().reshape(-1).to(device=device, dtype=dtype) for name in names])


def weighted_sum(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """out (P,) = sum_k weights_k rows_k, reading only rows of weight other than 0. rows: (K, P)."""
    used = [k for k, weight in enumerate(weights.tolist()) if weight != 0]
    if len(used) == 1 and weights[used[0]] == 1:
        return out.copy_(rows[used[0]])
    weights = weights.to(rows)
    if len(used) < len(weights):
        out.zero_()
        for k in used:
            out.add_(rows[k] * weights[k])
        return out
    return torch.mv(rows.T, weights, out=out)
