"""No expert may be more than a part of any merge, however sure it is."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedmerge.federated.defenses._base import Defense, Exhibit, Finding


class Cap(Defense):
    """At the target, for every adaptive method: alpha_k <= most; what is cut off goes to the others in proportion.

    It costs no forward and no comparison, and would take from an honest expert too where it should decide alone.
    """

    at_target: ClassVar[bool] = True

    most: float = Field(0.6, gt=0, le=1, description="largest coefficient; at least 1/K, with which all are equal")

    def judge(self, exhibit: Exhibit) -> list[Finding]:
        """Nobody is judged."""
        return []
