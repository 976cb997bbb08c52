"""What a site makes of its runs (Rame et al., DiWA, NeurIPS 2022): the best of them, the mean of all, or a greedy soup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedmerge.federated.messages import Hyper
from fedmerge.federated.statistics._base import State


@dataclass(frozen=True)
class Run:
    """One trained run: its best checkpoint, that checkpoint's validation accuracy, and its hyper-parameters."""

    state: State
    accuracy: float
    hyper: Hyper


def select(runs: Sequence[Run], how: str, validate: Callable[[State], float]) -> State:
    """The expert of a site: its best run (the first of several), the mean of all, or the greedy soup.

    greedy: runs in falling order of validation accuracy; one joins if the accuracy of the mean does not fall (Wortsman et al.,
    Model soups, ICML 2022, recipe 1; ties are accepted as in DiWA).
    """
    order = sorted(runs, key=lambda run: -run.accuracy)
    if how == "best":
        return order[0].state
    if how == "uniform":
        return soup([run.state for run in runs])
    chosen = [order[0].state]
    best = validate(order[0].state)
    for run in order[1:]:
        reached = validate(soup([*chosen, run.state]))
        if reached >= best:
            chosen, best = [*chosen, run.state], reached
    return soup(chosen)


def soup(states: Sequence[State]) -> State:
    """The mean of state dicts; integer buffers are those of the first."""
    first = states[0]
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if first[name].is_floating_point() else first[name]
        for name in first
    }
