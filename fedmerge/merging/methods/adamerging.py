"""Coefficients of task vectors learned at the target by gradient steps on the entropy of the merged model."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Online, State
from fedmerge.merging.scoring.divergence import entropy, log_probabilities
from fedmerge.merging.state import carried_rows

BETAS = (0.9, 0.999)
EPS = 1e-8


class Adamerging(Online):
    """theta(c) = theta_0 + sum_k c_k tau_k; for each batch, `steps` steps of Adam on L(c) = (1/N) sum_i H(p(x_i; theta(c))).

    `layer` has one c_kl for each tensor l of the model. c is clamped to [0, 1] where it is used, so that its gradient is 0
    outside. The batch is predicted after its own steps, and c goes on to the next batch, or starts anew if `reset`.
    Where sources differ: FusionBench puts the model into training mode, which would switch dropout on; here it is evaluation
    mode. Its class clamps by default and its configuration does not. Where they are silent: BatchNorm statistics are the experts'
    mean. dL/dc_k = <dL/dtheta, tau_k>, so that one backward serves all K experts. Images whose logits are not finite have no part
    in L, and a step whose gradient is not finite is not taken: c would be NaN for the rest of the stream.
    Worked example: g = dL/dtheta = (1, -2), tau_1 = (1, 0), tau_2 = (0, 1): dL/dc = (1, -2); Adam's first step moves c by
    (-lr, +lr), whatever the size of the gradient.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> sure, unsure = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.1, 0.2]))
    >>> start = {"weight": torch.zeros(2, 1)}
    >>> adapt = fedmerge.Adapter(model, [sure, unsure], "adamerging", base=start, lr=0.1, steps=5)
    >>> adapt(torch.ones(4, 1)).exp()[0]
    tensor([0.9603, 0.0397])
    >>> adapt.state_dict()["weight"].T  # at first 0.3 (sure + unsure); the surer expert's part grows
    tensor([[ 1.5931, -1.5931]])
    """

    paper: ClassVar[str] = "Yang et al., AdaMerging, ICLR 2024"
    cost: ClassVar[str] = "4"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})
    gradient: ClassVar[bool] = True

    level: Literal["task", "layer"] = Field("task", description="one coefficient for each expert, or for each of its tensors")
    start_at: float = Field(0.3, ge=0, le=1, description="start value of every coefficient")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")
    steps: int = Field(1, ge=1, le=100, description="number of steps for each batch")
    clamp: bool = Field(True, description="whether coefficients are clamped to [0, 1]")
    reset: bool = Field(False, description="whether coefficients start anew with every batch")

    def start(self, bank: Bank) -> State:
        """Coefficients (K, L), L = 1 or the number of tensors, Adam's moments, and the steps (K,) that each has taken."""
        L = len(bank.slices) if self.level == "layer" else 1
        c = bank.theta.new_full((bank.K, L), self.start_at, dtype=bank.wide)
        return {"c": c, "first": torch.zeros_like(c), "second": torch.zeros_like(c), "taken": torch.zeros(bank.K, dtype=torch.long)}

    def carried(self, state: State, before: tuple[str, ...], bank: Bank) -> State:
        """Who stays goes on; a newcomer begins at `start_at` with Adam's first step. c are no shares: nothing is divided."""
        return {name: carried_rows(state[name], before, bank.names, fresh) for name, fresh in self.start(bank).items()}

    @property
    def whole(self) -> bool:
        """Gradients go to all task vectors."""
        return True

    def working_bytes(self, sizes: Sizes) -> int:
        """Task vectors of all experts, and their products with coefficients and with the gradient."""
        return 3 * 4 * sizes.experts * sizes.parameters

    def step(self, state: State, evidence: Evidence) -> tuple[State, Tensor]:
        """theta (P,) after this batch's steps, and Adam's state."""
        bank = evidence.bank
        state = self.start(bank) if self.reset else {name: value.to(bank.theta.device) for name, value in state.items()}
        tau = bank.tau
        for _ in range(self.steps):
            dc = self.gradient_of(state["c"], tau, evidence)
            if bool(torch.isfinite(dc).all()):
                state = self._adam(state, dc)
        return state, self.merged(state["c"], tau, bank)

    def merged(self, c: Tensor, tau: Tensor, bank: Bank) -> Tensor:
        """theta(c) (P,) for coefficients (K, L) and task vectors (K, P)."""
        used = c.clamp(0, 1) if self.clamp else c
        theta = bank.rows[bank.anchor("theta_0")] + (self._spread(used, bank) * tau).sum(0)
        if not bank.shared_head:
            theta[bank.head] = bank.theta[:, bank.head].mean(0)
        return theta.to(bank.theta)

    def gradient_of(self, c: Tensor, tau: Tensor, evidence: Evidence) -> Tensor:
        """dL/dc (K, L) of the batch's mean entropy; NaN if there is no image whose logits are finite."""
        bank, x = evidence.bank, evidence.batch
        evidence.charge(3)
        with torch.enable_grad():
            theta = self.merged(c, tau, bank).detach().requires_grad_()
            logits = bank.forward(theta, x)
            fine = torch.isfinite(logits).all(1)
            if not bool(fine.any()):
                return torch.full_like(c, torch.nan)
            if not bool(fine.all()):  # again without the others: times 0, the gradient of what is not finite would still be NaN
                evidence.charge(1)
                logits = bank.forward(theta, x[fine])
            loss = entropy(log_probabilities(logits)).mean()
            (g,) = torch.autograd.grad(loss, theta)
        if not bank.shared_head:
            g[bank.head] = 0
        along = g * tau  # (K, P)
        if self.level == "task":
            dc = along.sum(1, keepdim=True)
        else:
            dc = torch.stack([along[:, columns].sum(1) for columns in bank.slices.values()], 1)
        return torch.where((c >= 0) & (c <= 1), dc, 0) if self.clamp else dc

    def _spread(self, c: Tensor, bank: Bank) -> Tensor:
        """Coefficients for every parameter (K, P), or (K, 1)."""
        if self.level == "task":
            return c
        widths = torch.tensor([columns.stop - columns.start for columns in bank.slices.values()], device=c.device)
        return c.repeat_interleave(widths, 1)

    def _adam(self, state: State, g: Tensor) -> State:
        """One step of Kingma & Ba, Adam, ICLR 2015, algorithm 1, written out so that its state can be saved."""
        taken = state["taken"] + 1
        first = BETAS[0] * state["first"] + (1 - BETAS[0]) * g
        second = BETAS[1] * state["second"] + (1 - BETAS[1]) * g**2
        m, v = _unbiased(first, BETAS[0], taken), _unbiased(second, BETAS[1], taken)
        return {"c": state["c"] - self.lr * m / (v.sqrt() + EPS), "first": first, "second": second, "taken": taken}


def _unbiased(moment: Tensor, beta: float, taken: Tensor) -> Tensor:
    """moment_k / (1 - beta^n_k), n_k the steps that expert k has taken. moment: (K, L)."""
    return torch.stack([row / (1 - beta**n) for row, n in zip(moment, taken.tolist(), strict=True)])
