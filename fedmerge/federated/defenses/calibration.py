"""Is an expert far surer than the others on images that none of them knows?"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fedmerge.federated.defenses._base import Defense, Exhibit, Finding
from fedmerge.federated.pool.experts import Expert
from fedmerge.federated.security.audit import HIGHEST, LOWEST, state_digest
from fedmerge.merging.scoring.outliers import over_others


class Calibration(Defense):
    """s_k = median over probe images of the standard deviation of logits over classes; what counts is s_k over the others' median.

    A declared temperature must be one that can be fitted, 0.05 to 20. Within that it proves nothing: a site that is right on all of
    its own validation images honestly fits 0.05, and then decides every image where a method calibrates. `sharpest` bounds
    s_k / T_k as well, by raising T_k; it changes honest federations, for the better where this happens, and is off by default.
    """

    probe: ClassVar[bool] = True

    most: float = Field(4.0, gt=1, description="largest scale of logits that is not odd, as a multiple of the others' median")
    action: Literal["leave_out", "rescale"] = Field(
        "leave_out", description="what happens to an odd expert: it is left out, or (rescale) its head is divided by the multiple"
    )
    sharpest: float | None = Field(
        None, gt=1, description="largest s_k / T_k, as a multiple of the others' median; above it T_k is raised. Default: no bound"
    )

    def judge(self, exhibit: Exhibit) -> list[Finding]:
        """How many times as sharp as the others."""
        raw, declared = multiples(exhibit)
        found = []
        for expert, plain, calibrated in zip(exhibit.experts, raw.tolist(), declared.tolist(), strict=True):
            T = expert.temperature
            said = f"logits {plain:.2g} times the others' scale, most {self.most:g}; {calibrated:.2g} times at temperature {T:.2g}"
            excess = plain / self.most if LOWEST <= T <= HIGHEST else float("inf")
            if self.sharpest is not None:
                excess = max(excess, calibrated / (self.sharpest * SLACK))
                said += f", most {self.sharpest:g}"
            found.append(Finding(expert.site, self.kind(), plain, self.most, excess, said))
        return found

    def repair(self, exhibit: Exhibit, site: str) -> Expert | None:
        """The expert with the others' scale of logits, or with a temperature within its bounds."""
        at = exhibit.names.index(site)
        raw, declared = (float(values[at]) for values in multiples(exhibit))
        expert, heads = exhibit.experts[at], exhibit.parts.head
        factor = raw if raw > self.most else 1.0
        if factor > 1 and self.action == "leave_out":
            return None
        weights = {name: tensor / factor if name in heads else tensor for name, tensor in expert.weights.items()}
        T = min(max(expert.temperature, LOWEST), HIGHEST)
        if self.sharpest is not None:
            T *= max(1.0, declared / factor * expert.temperature / T / self.sharpest)
        return replace(expert, weights=weights, temperature=T, sha256=state_digest(weights))


SLACK = 1.001
"""What rounding may add to a temperature that has just been raised to its bound."""


def scales(logits: Tensor) -> Tensor:
    """s (K,) of logits (K, n, C)."""
    return logits.std(-1).median(-1).values


def multiples(exhibit: Exhibit) -> tuple[Tensor, Tensor]:
    """s_k and s_k / T_k over the others' medians, (K,) each."""
    s = scales(exhibit.logits()).clamp(min=1e-12)
    calibrated = s / exhibit.temperatures.clamp(min=1e-12)
    return over_others(s), over_others(calibrated)
