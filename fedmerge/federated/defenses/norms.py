"""Has an expert moved much farther from theta_0 than the others, or against them?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from fedmerge.federated.defenses._base import Defense, Exhibit, Finding
from fedmerge.merging.scoring.outliers import over_others


class Norms(Defense):
    """From weights alone: |tau_k| over the others' median, of encoder and head each, and the cosine to the others' mean direction.

    The bounds are wide, because what hospitals see and how long they train differ; they are there for what no training makes.
    """

    probe: ClassVar[bool] = False

    from_theta_0: ClassVar[bool] = True

    most: float = Field(4.0, gt=1, description="largest |tau_k| that is not odd, as a multiple of the others' median")
    least_cosine: float = Field(-0.2, ge=-1, le=0, description="least cosine between tau_k and the mean direction of the others")

    def judge(self, exhibit: Exhibit) -> list[Finding]:
        """The larger of both parts' multiples, and the cosine of the encoder."""
        encoder, head, cosine = distances(exhibit.taus, exhibit.encoder)
        found = []
        for site, e, h, c in zip(exhibit.names, encoder.tolist(), head.tolist(), cosine.tolist(), strict=True):
            excess = max(e / self.most, h / self.most, 1 + self.least_cosine - c)
            said = f"encoder {e:.2g} and head {h:.2g} times as far from theta_0 as the others; most {self.most:g}; cosine {c:+.2f}"
            found.append(Finding(site, self.kind(), max(e, h), self.most, excess, said))
        return found


def distances(taus: Callable[[], Iterable[Tensor]], encoder: slice) -> tuple[Tensor, Tensor, Tensor]:
    """|tau_k| of encoder and of head, each over the others' median, and the cosine of the encoder to the sum of the others'
    directions; (K,) each. taus: gives the task vectors (P,) one after the other, as often as it is asked; no two are held at once.
    """
    norms, whole = [], torch.zeros(())
    for tau in taus():
        norms.append([torch.linalg.vector_norm(tau[encoder]), torch.linalg.vector_norm(tau[encoder.stop :])])
        whole = whole + normalize(tau[encoder], dim=0)
    units = (normalize(tau[encoder], dim=0) for tau in taus())
    cosine = torch.stack([cosine_similarity(unit, whole - unit, dim=0) for unit in units])
    of_encoder, of_head = (over_others(column.clamp(min=1e-12)) for column in torch.tensor(norms).unbind(1))
    return of_encoder, of_head, cosine
