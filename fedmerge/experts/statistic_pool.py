"""Statistics on disk, beside the experts that they belong to: computed once, with the audit's lines of how they came."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedmerge.errors import FolderError
from fedmerge.experts.pool import Expert, ExpertPool
from fedmerge.experts.statistic import State, Statistic
from fedmerge.experts.train import SiteTask
from fedmerge.experts.upload import Item, state_digest


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

    def complete(self, task: SiteTask) -> bool:
        """Whether nothing has to be asked of the site of this task."""
        return self.pool.has(task) and not any(task in self.lacking(statistic) for statistic in task.uploads)

    def add(self, task: SiteTask, statistic: Statistic, state: State, items: list[Item]) -> None:
        """Keep what has passed the audit; the file appears whole or not at all."""
        from safetensors.torch import save_file

        file = self._file(task, statistic)
        file.parent.mkdir(parents=True, exist_ok=True)
        audit = json.dumps([asdict(item) for item in items])
        with tempfile.TemporaryDirectory(prefix=".draft-", dir=file.parent) as folder:
            draft = Path(folder) / file.name
            arrays = {name: tensor.contiguous() for name, tensor in state.items()}
            save_file(arrays, draft, {"sha256": state_digest(state), "audit": audit})
            draft.replace(file)

    def with_statistics(self, expert: Expert, task: SiteTask) -> Expert:
        """The expert with its statistics and their lines of the audit. Raises FolderError if a file is damaged."""
        found = {statistic.kind(): self._load(task, statistic) for statistic in task.uploads}
        audit = [line for _, lines in found.values() for line in lines]
        return replace(expert, statistics={kind: state for kind, (state, _) in found.items()}, audit=[*expert.audit, *audit])

    def _load(self, task: SiteTask, statistic: Statistic) -> tuple[State, list[dict[str, Any]]]:
        from safetensors import SafetensorError, safe_open

        file = self._file(task, statistic)
        try:
            with safe_open(file, "pt") as opened:
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
                said = opened.metadata()
            if state_digest(state) != said["sha256"]:
                raise ValueError("its digest differs")
            return state, json.loads(said["audit"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise FolderError(f"{file}: cannot be read ({error}); delete this file and the site computes it again") from None

    def _file(self, task: SiteTask, statistic: Statistic) -> Path:
        """One file for each way to compute it; in rounds, for each set of experts too."""
        name = f"{statistic.kind()}-{statistic.key}"
        if statistic.starts_from == "rounds":
            entries = "".join(self.pool.entry(other).name for other in self.tasks)
            name += f"-{hashlib.sha256(entries.encode()).hexdigest()[:16]}"
        return self.pool.entry(task) / "statistics" / f"{name}.safetensors"
