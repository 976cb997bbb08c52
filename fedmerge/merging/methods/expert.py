"""Every expert alone, unmerged."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedmerge.errors import Problem, ScenarioError, nearest
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Method, Output


class SingleExpert(Output):
    """p = softmax(z_k): the row of site k, or one row for each site if none is named.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> sure, unsure = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.1, 0.2]))
    >>> adapt = fedmerge.Adapter(model, {"sure": sure, "unsure": unsure}, "expert", site="unsure")
    >>> adapt(torch.ones(1, 1)).exp()
    tensor([[0.4750, 0.5250]])
    """

    paper: ClassVar[str] = "the hospital's own model (selection as in Gulrajani & Lopez-Paz, ICLR 2021)"
    cost: ClassVar[str] = "1"

    site: str | None = Field(None, description="the site whose expert predicts; default: each in turn")

    @property
    def key(self) -> str:
        """`expert:axial`, unless a label is given."""
        return self.label or (f"expert:{self.site}" if self.site else "expert")

    def expand(self, names: tuple[str, ...]) -> tuple[Method, ...]:
        """One row of the table for every expert, or the one that is named; none while it is away."""
        if self.site:
            return (self,) * (self.site in names)
        return tuple(SingleExpert(site=name, with_theta_0=self.with_theta_0) for name in names)

    def predict(self, evidence: Evidence) -> Tensor:
        """Class probabilities (N, C) of the named expert. Raises ScenarioError if there is none of that name."""
        names = evidence.bank.names
        if self.site not in names:
            raise ScenarioError([Problem("method expert", "site", f"'{self.site}'", "an expert", nearest(str(self.site), names))])
        return evidence.log_p()[names.index(self.site)].exp()

    def forwards_alone(self, asked: int, experts: int) -> int:
        """One: alone, this method would run its own expert and no other."""
        return asked // experts
