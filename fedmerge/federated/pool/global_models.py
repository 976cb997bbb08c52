"""Global models on disk, beside the experts: a folder for each, with the last round that is whole, and the ledger of all rounds."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmerge.errors import FolderError
from fedmerge.federated.messages import SiteTask
from fedmerge.federated.pool.experts import fingerprint
from fedmerge.federated.pool.tensor_file import save
from fedmerge.federated.security.audit import Item, state_digest, write_audit
from fedmerge.federated.statistics._base import State
from fedmerge.federated.strategies._base import Strategy
from fedmerge.system.files import atomic_folder

THETA, MEMORY = "theta.", "memory."
ROUND = re.compile(r"round-(\d{4})")
STALE_S = 3600.0
"""Age at which the draft of a round is that of a process that was killed, seconds."""


@dataclass(frozen=True)
class Turn:
    """One hospital in one round. up, down: bytes of arrays and numbers. validation_accuracy: of theta^r on the hospital's own."""

    round: int
    site: str
    n: int
    steps: int
    up: int
    down: int
    validation_accuracy: float


@dataclass(frozen=True)
class Absence:
    """A hospital that was asked in a round which went on without it, and why."""

    round: int
    site: str
    reason: str


@dataclass(frozen=True)
class Stand:
    """How far a global model is: rounds done, theta, what the server remembers, and every turn so far. seconds: of all rounds."""

    rounds: int
    theta: State
    memory: State
    turns: tuple[Turn, ...]
    seconds: float = 0.0
    absences: tuple[Absence, ...] = ()


@dataclass(frozen=True)
class GlobalModel:
    """A strategy whose rounds are all done, and what they have made. hospitals: how many there are, asked or not."""

    strategy: Strategy
    stand: Stand
    hospitals: int

    def as_record(self) -> dict[str, Any]:
        """For the manifest: of every site, the rounds that it took part in, its steps and bytes; and how theta^r did meanwhile.

        absent: who was asked in a round that went on without it.
        validation: of every round, the mean over its sites of the accuracy on their own validation images, weighted by n.
        """
        turns = self.stand.turns
        sites = {turn.site: [one for one in turns if one.site == turn.site] for turn in turns}
        rounds = [[turn for turn in turns if turn.round == number] for number in range(1, self.stand.rounds + 1)]
        return {
            "rounds": self.stand.rounds,
            "hospitals": self.hospitals,
            "absent": [asdict(absence) for absence in self.stand.absences],
            "sha256": state_digest(self.stand.theta),
            "seconds": round(self.stand.seconds, 3),
            "sites": {
                site: {"rounds": len(own), **{key: sum(getattr(t, key) for t in own) for key in ("steps", "up", "down")}}
                for site, own in sites.items()
            },
            "validation": [
                sum(turn.n * turn.validation_accuracy for turn in own) / sum(turn.n for turn in own) for own in rounds if own
            ],
        }


class GlobalPool:
    """A folder with one folder for each global model, keyed by all that determines it."""

    def __init__(self, path: Path, tasks: Sequence[SiteTask]) -> None:
        self.path = path / "federated"
        self.initial = tasks[0].initial_sha256
        self.sites = [fingerprint(task) for task in tasks]

    def entry(self, strategy: Strategy) -> Path:
        """The folder of a strategy's model, whether it exists or not."""
        return self.path / f"{strategy.kind()}-{strategy.digest(self.initial, self.sites)[:16]}"

    def has(self, strategy: Strategy) -> bool:
        """Whether all rounds are done."""
        return (self.entry(strategy) / f"round-{strategy.rounds:04d}").is_dir()

    def done(self, strategy: Strategy) -> int:
        """The last round that is there; whether it is damaged, `last` sees."""
        return max((number for number, _ in self._rounds(self.entry(strategy))), default=0)

    def keep(self, strategy: Strategy, stand: Stand, items: Sequence[Item] = ()) -> None:
        """This round instead of those before it; it appears whole or not at all. items: the audit of what was sent in it.

        The audit of all rounds stays in `audit.jsonl` beside them, since a run folder has that of its own rounds alone.
        """
        entry = self.entry(strategy)
        entry.mkdir(parents=True, exist_ok=True)
        for left in entry.glob(".round-*"):
            if time.time() - left.stat().st_mtime > STALE_S:
                shutil.rmtree(left, ignore_errors=True)
        write_audit(entry / "audit.jsonl", list(items))
        whole = {**{THETA + name: t for name, t in stand.theta.items()}, **{MEMORY + name: t for name, t in stand.memory.items()}}
        told: dict[str, Any] = {
            "strategy": strategy.fields(),
            "sha256": state_digest(stand.theta),
            "rounds": stand.rounds,
            "seconds": round(stand.seconds, 3),
            "turns": [asdict(turn) for turn in stand.turns],
            "absences": [asdict(absence) for absence in stand.absences],
        }
        with atomic_folder(entry / f"round-{stand.rounds:04d}") as draft:
            save(draft / "model.safetensors", whole)
            (draft / "manifest.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
        for number, folder in self._rounds(entry):
            if number < stand.rounds:
                shutil.rmtree(folder, ignore_errors=True)

    def model(self, strategy: Strategy) -> GlobalModel:
        """The model of a strategy whose rounds are done. Raises FolderError if it is damaged."""
        stand = self.last(strategy)
        assert stand is not None
        return GlobalModel(strategy, stand, len(self.sites))

    def last(self, strategy: Strategy) -> Stand | None:
        """The last round that is there, its digest verified. Raises FolderError if it is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        there = self._rounds(self.entry(strategy))
        if not there:
            return None
        number, folder = there[-1]
        try:
            whole = load_file(folder / "model.safetensors")
            told = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            theta = {name.removeprefix(THETA): tensor for name, tensor in whole.items() if name.startswith(THETA)}
            memory = {name.removeprefix(MEMORY): tensor for name, tensor in whole.items() if name.startswith(MEMORY)}
            if (here := state_digest(theta)) != told["sha256"]:
                raise ValueError(f"sha256: found {here[:16]}; expected {told['sha256'][:16]}")
            turns, absences = (Turn(**one) for one in told["turns"]), (Absence(**one) for one in told["absences"])
            return Stand(number, theta, memory, tuple(turns), float(told["seconds"]), tuple(absences))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise FolderError(
                f"{folder}: found one that cannot be read ({error}); expected a whole one. Delete {folder.parent} to run them again"
            ) from None

    @staticmethod
    def _rounds(entry: Path) -> list[tuple[int, Path]]:
        found = ((ROUND.fullmatch(folder.name), folder) for folder in entry.glob("round-*"))
        return sorted((int(name[1]), folder) for name, folder in found if name)
