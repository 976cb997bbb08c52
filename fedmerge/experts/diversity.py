"""Hyper-parameters of diverse runs: the defaults first, then independent draws (Rame et al., DiWA, NeurIPS 2022, appendix)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedmerge.folder import Spec
from fedmerge.seeds import generator

Hyper = dict[str, float]


class Draw(Spec):
    """The value of run 0, and the values that later runs draw from."""

    default: float = Field(ge=0)
    draw: tuple[float, ...] = Field(min_length=1)


MILD = {
    "lr": Draw(default=5e-5, draw=(1e-5, 3e-5, 5e-5)),
    "weight_decay": Draw(default=0, draw=(1e-4, 1e-6)),
    "dropout": Draw(default=0, draw=(0, 0.1, 0.5)),
}


class Diversity(Spec):
    """Where the runs of a hospital differ. mild: the ranges of DiWA. wide: those of DomainBed, which averages badly."""

    space: Literal["mild", "wide"] = Field("mild", description="ranges of what is not given here")
    lr: Draw | None = Field(None, description="learning rate")
    weight_decay: Draw | None = Field(None, description="weight decay")
    dropout: Draw | None = Field(None, description="dropout before the head")

    def hyper_parameters(self, run: int, site: str, seed: int) -> Hyper:
        """Learning rate, weight decay and dropout of one run; every one is drawn by its own name."""
        return {name: self._value(name, run, generator(seed, "diversity", site, run, name)) for name in MILD}

    def _value(self, name: str, run: int, rng: np.random.Generator) -> float:
        given: Draw | None = getattr(self, name)
        if run == 0:
            return (given or MILD[name]).default
        if given or self.space == "mild" or name == "dropout":
            return float(rng.choice((given or MILD[name]).draw))
        low, high = {"lr": (-5, -3.5), "weight_decay": (-6, -2)}[name]
        return float(10 ** rng.uniform(low, high))
