"""What runs in the target's process, whoever has started it: it takes experts one at a time, and answers for its site."""

from __future__ import annotations

import os
from typing import Any

from fedmerge.adaptation.tasks import Arrays, Contribution, TargetTask
from fedmerge.federated.client.site_log import discreet


class Host:
    """The target site is made here, so that its images are nowhere else."""

    site: Any = None

    def begin(self, task: TargetTask, base: Arrays, experts: int, shards: Any = None) -> None:
        """Make room for so many experts; those that are here go, and what methods remember of them stays. shards: who has their
        parameters, if it is not this process."""
        from fedmerge.adaptation.expert_loader import Holding

        self.name = task.site.name
        with discreet(self.name):
            if self.site is not None:
                self.site.leave()
            self.holding = Holding(task, base, experts, self.site.images if self.site is not None else None, shards)

    def admit(self, expert: Contribution) -> None:
        """Take the next expert."""
        with discreet(self.name):
            self.holding.admit(expert)

    def open(self, snapshot: dict[str, Any] | None) -> None:
        """Make the target site from all that have come, where it stood if it has stood anywhere."""
        from fedmerge.adaptation.target_site import TargetSite

        with discreet(self.name):
            self.site = TargetSite(self.holding.task, self.holding, self.holding.base)
            if snapshot:
                self.site.restore(snapshot)

    def change(self) -> dict[str, Any]:
        """Go on with the experts that have come instead of those that were here; the site's state after it."""
        with discreet(self.name):
            self.site.adopt(self.holding)
            return self.site.snapshot()  # type: ignore[no-any-return]

    def process(self) -> int:
        """Number of this process."""
        return os.getpid()

    def call(self, name: str, *arguments: Any) -> tuple[Any, dict[str, Any]]:
        """What a method of the target site returns, and the site's state after it: in one answer, so that neither comes alone."""
        with discreet(self.name):
            return getattr(self.site, name)(*arguments), self.site.snapshot()
