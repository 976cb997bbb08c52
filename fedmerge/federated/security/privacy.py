"""Differential privacy of an upload: what a hospital has learned is shortened to a known length and drowned in Gaussian noise.

The upload is theta_0 + clip(tau) + N(0, (z C)^2 I), tau = theta - theta_0, clip(tau) = tau min(1, C / |tau|): the Gaussian
mechanism (Dwork & Roth 2014, appendix A) on the whole task vector, once. Whatever the hospital did before (training, picking a run
on its validation images) is part of tau, and covered.

Unit of protection: the hospital. Neighbors are any two data sets that the same hospital might have had, one image more or less or
every patient another, so that tau may change by 2 C: the mechanism is mu-GDP with mu = 2 / z (Dong, Roth & Su 2022), and epsilon
at a given delta is that of the analytic Gaussian mechanism (Balle & Wang 2018). Of one upload: a hospital that sends m noised
uploads has mu sqrt(m).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmerge.federated.security.audit import Upload
from fedmerge.federated.statistics._base import State
from fedmerge.merging.bank.layout import Parts
from fedmerge.registry import Spec
from fedmerge.rng import generator

Bytes = Callable[[int], bytes]
"""A source of so many random bytes."""

MOST_EPSILON = 500.0
"""Beyond it the accountant does not look: an event may be e^500 times likelier, which protects nobody."""


class Privacy(Spec):
    """Clipping and noise of every hospital's upload. Left out, uploads are exact."""

    clip: float = Field(gt=0, description="largest L2 norm C of a hospital's task vector, all parameters together")
    noise_multiplier: float = Field(gt=0, description="z, the standard deviation of the noise as a multiple of C")
    delta: float = Field(1e-5, gt=1e-15, lt=1, description="probability with which the promise of epsilon may fail")
    noise_from: Literal["seed", "system"] = Field(
        "seed",
        description="source of the noise. seed: reproducible, for simulations only, since whoever knows the seed can"
        " subtract the noise; system: the operating system's entropy",
    )

    @property
    def mu(self) -> float:
        """The mechanism is mu-GDP: sensitivity 2 C over standard deviation z C."""
        return 2 / self.noise_multiplier

    @property
    def epsilon(self) -> float | None:
        """The smallest epsilon at `delta` for one upload, exact; None if it is above MOST_EPSILON."""
        from scipy.optimize import brentq

        if delta_of(0.0, self.mu) <= self.delta:
            return 0.0
        if delta_of(MOST_EPSILON, self.mu) > self.delta:
            return None
        return float(brentq(lambda epsilon: delta_of(epsilon, self.mu) - self.delta, 0.0, MOST_EPSILON))

    def complaint(self, weights: State, theta_0: State) -> str:
        """Why these weights cannot be a noised upload, or nothing. Noise may exceed what `limits` allows of exact ones.

        |tau| <= C + z C (sqrt(P) + 6), but for one upload in e^18: the norm of a Gaussian concentrates (Borell 1975).
        """
        names = [name for name in theta_0 if theta_0[name].is_floating_point()]
        tau = torch.cat([(weights[name].double() - theta_0[name].double()).flatten() for name in names])
        most = self.clip * (1 + self.noise_multiplier * (math.sqrt(len(tau)) + 6))
        norm = float(tau.norm())
        if norm <= most:
            return ""
        return f"found weights {norm:.3g} away from theta_0; expected at most {most:.3g}, by the scenario's clip and noise"

    def report(self) -> dict[str, Any]:
        """For the manifest: what was asked for, and what it promises."""
        unit = "one upload; any data set of the hospital against any other"
        return {**self.model_dump(mode="json"), "epsilon": self.epsilon, "mu": self.mu, "unit": unit, "said": self.said()}

    def said(self) -> str:
        """One line for audit and report."""
        epsilon = self.epsilon
        bound = f"above {MOST_EPSILON:g}, which promises nothing," if epsilon is None else f"{epsilon:.3g}"
        seeded = "" if self.noise_from == "system" else "; simulated: its noise can be drawn again from the scenario's seed"
        return f"noised: epsilon {bound} at delta {self.delta:g} (clip {self.clip:g}, z {self.noise_multiplier:g}){seeded}"


def delta_of(epsilon: float, mu: float) -> float:
    """The smallest delta at epsilon of one release of the Gaussian mechanism, sensitivity over standard deviation mu.

    delta = Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu) (Balle & Wang, ICML 2018, theorem 8): exact, and so
    below every bound by Renyi divergences. By logarithms, as e^epsilon alone is beyond all numbers where Phi is next to none.
    Worked example: epsilon = 0, mu = 2: Phi(1) - Phi(-1) = 0.683, the total variation of two normals that are 2 apart.
    """
    from scipy.special import log_ndtr

    here = log_ndtr(mu / 2 - epsilon / mu)
    there = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return float(math.exp(here) * -math.expm1(min(0.0, there - here)))


def protect(upload: Upload, theta_0: State, parts: Parts, privacy: Privacy, seed: int) -> Upload:
    """The upload with noise in its parameters, and nothing else of the hospital's: buffers are theta_0's, and no number is sent."""
    entropy: Bytes = os.urandom if privacy.noise_from == "system" else generator(seed, "privacy", upload.site).bytes
    sigma = privacy.noise_multiplier * privacy.clip
    weights = noised(upload.weights, theta_0, parts, privacy.clip, sigma, entropy)
    return replace(upload, weights=weights, scalars={})


def noised(state: State, theta_0: State, parts: Parts, clip: float, sigma: float, entropy: Bytes) -> State:
    """theta_0 + clip(tau) + sigma N(0, I) over all parameters, in float64 until the last step; every other tensor is theta_0's.

    clip: C. sigma: the noise's standard deviation z C.
    """
    tau = {name: state[name].double() - theta_0[name].double() for name in (*parts.encoder, *parts.head)}
    norm = float(torch.cat([part.flatten() for part in tau.values()]).norm())
    shrink = min(1.0, clip / norm) if norm else 1.0
    found = {name: tensor.clone() for name, tensor in theta_0.items()}
    for name, part in tau.items():
        noise = gaussian(part.numel(), entropy).view(part.shape)
        found[name] = (theta_0[name].double() + shrink * part + sigma * noise).to(theta_0[name].dtype)
    return found | {alias: found[name].clone() for alias, name in parts.aliases.items()}


def gaussian(count: int, entropy: Bytes) -> Tensor:
    """Standard normal draws (count,), float64, each from 52 bits of entropy through the inverse distribution function."""
    from scipy.special import ndtri

    bits = np.frombuffer(entropy(8 * count), np.uint64) >> np.uint64(12)
    return torch.from_numpy(ndtri((bits.astype(np.float64) + 0.5) / 2.0**52))  # exact, so that neither 0 nor 1 is met
