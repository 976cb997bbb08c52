"""What the coordinator and the hospitals say to each other, whatever carries the messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedmerge.experts.initialisation import Initial
from fedmerge.experts.limits import DEFAULT, Limits
from fedmerge.experts.train import SiteTask
from fedmerge.experts.upload import Upload

START_GRACE_S = 120.0
"""What the carriers of messages may take to start and to stop, on top of the hospitals' deadline, seconds."""


@dataclass(frozen=True)
class Tick:
    """Progress of one site: steps done, steps in all, a few words. Nothing else is told before the upload."""

    site: str
    done: int
    total: int
    text: str


@dataclass(frozen=True)
class Outcome:
    """How asking one site ended. trained: it trained now. reason: why there is no expert, or empty. tries: how often it began."""

    site: str
    trained: bool
    reason: str = ""
    tries: int = 1


@dataclass(frozen=True)
class Reply:
    """One site's answer: an upload, or the reason why there is none. seconds: since it was asked.

    refused: something came, and could not even be read as an upload.
    """

    task: SiteTask
    upload: Upload | None
    reason: str
    seconds: float
    refused: bool = False


@dataclass(frozen=True)
class Request:
    """What one site is asked. what: "train", "probe", or a kind of statistic. weights: what it starts from. layers: of a round."""

    what: str
    task: SiteTask
    weights: dict[str, Tensor]
    layers: tuple[str, ...] = ()


Ask = Callable[[Sequence[Request], float], Iterator[Reply]]
"""(one request for each site, deadline in seconds) -> replies as they arrive."""

OnTick = Callable[[Tick], None]


@dataclass(frozen=True)
class Job:
    """What is to be gathered, and where it goes.

    at_least: so many sites are enough; None means all. limits: what weights may be to be let in.
    """

    tasks: tuple[SiteTask, ...]
    initial: Initial
    pool: Path
    audit: Path
    deadline_s: float
    at_least: int | None = None
    limits: Limits = DEFAULT

    @property
    def silence(self) -> str:
        """The reason for a site that has not answered."""
        return f"did not answer within {self.deadline_s:g} s"


@dataclass(frozen=True)
class Carrier:
    """What carries a job to the hospitals and back.

    gather: experts and statistics into the pool. probe: theta_0 with a head. compete: global models, and why there is none, by key.
    """

    gather: Callable[[Job, OnTick], dict[str, Outcome]]
    probe: Callable[[Job, OnTick], Initial]
    compete: Callable[[Job, OnTick], dict[str, str]]
