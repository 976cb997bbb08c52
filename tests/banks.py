"""A bank with everything that any method may need, and what any method predicts with it."""

from __future__ import annotations

import torch

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.evidence import Answer, Evidence
from fedmerge.merging.methods._base import Adaptive, Method, Online, Output, Static
from tests.conftest import Net, expert_states

COUNTS, TEMPERATURES = [30, 10, 20, 40], [0.8, 1.0, 1.3, 0.9]


def statistics(order: list[int], states: list[dict[str, torch.Tensor]]) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Statistics of expert k, whatever its place: random Fisher information and Gram matrices; the soup is the expert."""

    def fisher(k: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 + k)
        return {name: torch.rand(p.shape, generator=generator, dtype=torch.float64) for name, p in Net().named_parameters()}

    def gram(k: int) -> dict[str, torch.Tensor]:
        X = torch.randn(50, 4, generator=torch.Generator().manual_seed(200 + k), dtype=torch.float64)
        return {"head.weight": X.T @ X / 50}

    def centroid(k: int) -> dict[str, torch.Tensor]:
        f = 1 + 0.01 * torch.randn(4, generator=torch.Generator().manual_seed(300 + k), dtype=torch.float64)
        return {"centroid": f / f.norm()}

    return {
        "fisher": [fisher(k) for k in order],
        "soup": [states[k] for k in order],
        "gram": [gram(k) for k in order],
        "gram_rounds": [gram(k) for k in order],
        "centroid": [centroid(k) for k in order],
    }


def a_bank(
    states: list[dict[str, torch.Tensor]],
    dtype: torch.dtype = torch.float64,
    order: list[int] | None = None,
    base: dict[str, torch.Tensor] | None = None,
) -> Bank:
    order = order or list(range(len(states)))
    return Bank.of(
        Net(),
        {f"site-{k}": states[k] for k in order},
        base or expert_states(1, 99)[0],
        generalist=base or expert_states(1, 98)[0],
        statistics=statistics(order, states),
        counts=[COUNTS[k] for k in order],
        temperatures=[TEMPERATURES[k] for k in order],
        dtype=dtype,
    )


def a_batch(n: int = 6, dtype: torch.dtype = torch.float64, seed: int = 3) -> torch.Tensor:
    return torch.randn(n, 1, 10, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def an_answer(n: int) -> Answer:
    return Answer(torch.arange(n) % 3, torch.arange(n) % 2)


def outcome(method: Method, bank: Bank, batch: torch.Tensor) -> torch.Tensor:
    """What a method predicts, (N, C) probabilities, whatever its kind; an oracle is told the truth."""
    evidence = Evidence(bank, batch)
    if isinstance(method, Output):
        return method.predict(evidence)
    if isinstance(method, Static):
        return bank.forward(method.merge(bank), batch, method.statistics(bank)).softmax(-1)
    if isinstance(method, Online):
        return bank.forward(method.step(method.start(bank), evidence)[1], batch).softmax(-1)
    assert isinstance(method, Adaptive)
    c = coefficients(method, evidence).on_one_scale()
    if c.encoder.ndim == 2:
        each = [bank.forward(bank.mix(e, h), x[None], e) for e, h, x in zip(c.encoder, c.head, batch, strict=True)]
        return torch.cat(each).softmax(-1)
    return bank.forward(bank.mix(c.encoder, c.head), batch, c.encoder).softmax(-1)


def coefficients(method: Adaptive, evidence: Evidence) -> Coefficients:
    """Of the first batch, after the first pass if there is one; an oracle is told the truth."""
    with evidence.opened(an_answer(len(evidence.batch))):
        state = method.start(evidence.bank)
        if method.transductive:
            state = method.survey(state, evidence)
        return method.step(state, evidence)[1]
