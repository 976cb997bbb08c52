"""Statistics on disk, beside the experts that they belong to: computed once, with the audit's lines of how they came."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedmerge.errors import FolderError, UploadRefused
from fedmerge.federated.messages import SiteTask
from fedmerge.federated.pool import tensor_file
from fedmerge.federated.pool.experts import Expert, ExpertPool, check_seal
from fedmerge.federated.security.audit import Item, Seal, state_digest
from fedmerge.federated.security.statement import parsed
from fedmerge.federated.statistics._base import State, Statistic


class StatisticPool:
    """What the sites of one job have uploaded beside experts. tasks: all of the job, which statistics in rounds depend on."""

    def __init__(self, pool: ExpertPool, tasks: Sequence[SiteTask]) -> None:
        self.pool, self.tasks = pool, tuple(tasks)

    def has(self, task: SiteTask, statistic: Statistic) -> bool:
        """Whether this statistic of this task's expert is there."""
        return self.pool.has(task) and self._file(task, statistic).is_file()

    def lacking(self, statistic: Statistic) -> list[SiteTask]:
        """The sites to ask for it: those without, or all if it takes rounds and one is without."""
        without = [task for task in self.tasks if not self.has(task, statistic)]
        return list(self.tasks) if without and statistic.starts_from == "rounds" else without

    def incomplete(self) -> list[SiteTask]:
        """The tasks whose sites have to be asked something."""
        asked = {statistic.key + statistic.kind(): statistic for task in self.tasks for statistic in task.uploads}
        lacking = {key: {task.site.name for task in self.lacking(statistic)} for key, statistic in asked.items()}

        def lacks(task: SiteTask) -> bool:
            return any(task.site.name in lacking[statistic.key + statistic.kind()] for statistic in task.uploads)

        return [task for task in self.tasks if not self.pool.has(task) or lacks(task)]

    def add(
        self, task: SiteTask, statistic: Statistic, state: State, items: list[Item], seals: Sequence[Seal] = (), digest: str = ""
    ) -> None:
        """Keep what has passed the audit, with what the site has signed, and its digest if known; whole or not at all."""
        audit = json.dumps([item.as_line() for item in items])
        sealed = json.dumps([asdict(seal) for seal in seals if seal.text])
        tensor_file.put(self._file(task, statistic), state, digest=digest, audit=audit, seals=sealed)

    def with_statistics(self, expert: Expert, task: SiteTask) -> Expert:
        """The expert with its statistics and their lines of the audit. Raises FolderError if a file is damaged."""
        found = {statistic.kind(): self._load(task, statistic) for statistic in task.uploads}
        audit = [line for _, lines in found.values() for line in lines]
        return replace(expert, statistics={kind: state for kind, (state, _) in found.items()}, audit=[*expert.audit, *audit])

    def _load(self, task: SiteTask, statistic: Statistic) -> tuple[State, list[dict[str, Any]]]:
        file, mend = self._file(task, statistic), "delete this file and the site computes it again"
        state, words, digest = tensor_file.take(file, mend)
        try:
            for seal in (Seal(**one) for one in json.loads(words["seals"])):
                check_seal(seal, task.site)
                statement = parsed(seal, task.site.name)
                here = state_digest({name: state[name] for name in statement.layers}) if statement.layers else digest
                if statement.statistics.get(statistic.kind()) != here:
                    raise ValueError("it is not what the site has stated")
            return state, json.loads(words["audit"])
        except (ValueError, KeyError, TypeError, UploadRefused) as error:
            raise FolderError(
                f"{file}: found a file that cannot be read ({error}); expected a whole one. {mend[0].upper()}{mend[1:]}"
            ) from None

    def _file(self, task: SiteTask, statistic: Statistic) -> Path:
        """One file for each way to compute it; in rounds, for each set of experts too."""
        name = f"{statistic.kind()}-{statistic.key}"
        if statistic.starts_from == "rounds":
            entries = "".join(self.pool.entry(other).name for other in self.tasks)
            name += f"-{hashlib.sha256(entries.encode()).hexdigest()[:16]}"
        return self.pool.entry(task) / "statistics" / f"{name}.safetensors"
