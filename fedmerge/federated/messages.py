"""What the server and the hospitals say to each other, whatever carries the messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from fedmerge.federated.model import AnyModel
from fedmerge.federated.security.audit import Upload
from fedmerge.federated.security.limits import DEFAULT, Limits
from fedmerge.federated.security.privacy import Privacy
from fedmerge.federated.site import Site
from fedmerge.federated.statistics._base import STATISTICS
from fedmerge.federated.strategies._base import STRATEGIES, Optimizer
from fedmerge.registry import Spec
from fedmerge.rng import generator

Hyper = dict[str, float]


class Draw(Spec):
    """The value of run 0, and the values that later runs draw from."""

    default: float = Field(ge=0, description="value of run 0")
    draw: tuple[float, ...] = Field(min_length=1, description="values that later runs draw from")


MILD = {
    "lr": Draw(default=5e-5, draw=(1e-5, 3e-5, 5e-5)),
    "weight_decay": Draw(default=0, draw=(1e-4, 1e-6)),
    "dropout": Draw(default=0, draw=(0, 0.1, 0.5)),
}


class Diversity(Spec):
    """Where the runs of a hospital differ. mild: the ranges of DiWA. wide: those of DomainBed, which averages badly."""

    space: Literal["mild", "wide"] = Field(
        "mild", description="ranges of hyper-parameters that are not given here; wide draws batch sizes, too"
    )
    lr: Draw | None = Field(None, description="learning rate")
    weight_decay: Draw | None = Field(None, description="weight decay")
    dropout: Draw | None = Field(None, description="dropout before the head")

    def hyper_parameters(self, run: int, site: str, seed: int) -> Hyper:
        """Learning rate, weight decay and dropout of one run, in the wide space also its batch size; each drawn by its own name.

        Run 0 has the batch size of the training.
        """
        names = [*MILD, *(("batch_size",) if self.space == "wide" and run > 0 else ())]
        return {name: self._value(name, run, generator(seed, "diversity", site, run, name)) for name in names}

    def _value(self, name: str, run: int, rng: np.random.Generator) -> float:
        if name == "batch_size":
            return float(int(2 ** rng.uniform(3, 5.5)))
        given: Draw | None = getattr(self, name)
        if run == 0:
            return (given or MILD[name]).default
        if given or self.space == "mild" or name == "dropout":
            return float(rng.choice((given or MILD[name]).draw))
        low, high = {"lr": (-5, -3.5), "weight_decay": (-6, -2)}[name]
        return float(10 ** rng.uniform(low, high))


Strength = Literal["none", "light", "full"]
LearningRate = Literal["constant", "cosine"]
Arithmetic = Literal["float32", "float32_channels_last", "bfloat16"]
AnyStatistic: Any = STATISTICS.union()
AnyStrategy: Any = STRATEGIES.union()


class Training(Spec):
    """How every hospital trains. Defaults follow Rame et al. (DiWA, NeurIPS 2022)."""

    runs: int = Field(
        5,
        ge=1,
        le=100,
        description="number of runs of each hospital: one with default hyper-parameters, the others with drawn ones",
    )
    epochs: int = Field(50, ge=1, description="passes over the hospital's training images")
    max_steps: int = Field(5001, ge=1, description="largest number of steps of a run, whatever the epochs")
    batch_size: int = Field(32, ge=1, description="images per training batch")
    evaluations: int = Field(20, ge=1, description="number of validations of a run; the best checkpoint is kept")
    select: Literal["best", "uniform", "greedy"] = Field(
        "best", description="how a hospital makes its expert: the best run, or a soup (mean) of all runs or of a greedy choice"
    )
    optimizer: Optimizer = Field("adam", description="optimizer; adamw decouples weight decay; sgd has momentum 0.9")
    schedule: LearningRate = Field(
        "constant",
        description="schedule of the learning rate; cosine: warm-up during a tenth of the steps, then half a cosine down to 0",
    )
    augment: Strength = Field(
        "full", description="random crops, flips and jitter of training images: full as in DomainBed, light milder"
    )
    diversity: Diversity = Field(default_factory=Diversity, description="hyper-parameters in which the runs differ")
    precision: Arithmetic = Field(
        "float32",
        description="of forwards and losses; weights, optimizer and uploads are always float32. bfloat16 suits large models where "
        "the CPU or GPU computes with it; float32_channels_last, another order of float32 sums, suits convolutions on a CPU",
    )
    threads: int = Field(1, ge=1, description="number of threads of each hospital; changes the last bits of an expert")
    retries: int = Field(1, ge=0, le=20, description="how often a hospital whose process has died is asked again")
    deadline_s: float = Field(3600, gt=0, description="longest wait for the hospitals' answers, in seconds")

    @model_serializer(mode="wrap")
    def _without_what_is_new(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Older versions knew float32 alone and have no word for it: their experts, runs and hospitals stay the same."""
        return {key: value for key, value in handler(self).items() if key != "precision" or value != "float32"}


class SiteTask(Spec):
    """Everything a hospital is asked, as it travels to it.

    classes: outputs of the head. own: those of them that the hospital trains on, where it has a task of its own; otherwise all.
    uploads: statistics beside its expert, one of a kind. federated: strategies in whose rounds it takes part.
    """

    site: Site
    model: AnyModel
    training: Training
    classes: tuple[str, ...]
    seed: int
    initial_sha256: str
    head_init: str
    own: tuple[str, ...] = ()
    uploads: tuple[AnyStatistic, ...] = ()
    federated: tuple[AnyStrategy, ...] = ()
    privacy: Privacy | None = None

    @property
    def runs(self) -> int:
        """Runs that the hospital trains: none where it brings its expert."""
        return 0 if self.site.expert else self.training.runs


HeadInit = Literal["shared_random", "fed_lp", "per_site_random", "zero", "text"]


@dataclass(frozen=True)
class Initial:
    """theta_0 as a whole state dict, its digest, and words for the report. heads: names of the classifier's parameters.

    target_head: what the target has in place of the hospitals' head, where its classes are others.
    known: whether it is one that anybody has started from; otherwise it tells the layout of weights and nothing else.
    """

    weights: dict[str, Tensor]
    sha256: str
    head_init: HeadInit
    description: str
    heads: tuple[str, ...] = ()
    target_head: dict[str, Tensor] = field(default_factory=dict)
    known: bool = True


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


class Backend(Protocol):
    """What carries jobs to the hospitals and back: a plain loop, Flower's simulation, or processes of the hospitals' own."""

    def gather(self, job: Job, on_tick: OnTick) -> dict[str, Outcome]:
        """Experts and statistics into the pool; how asking each site ended."""

    def probe(self, job: Job, on_tick: OnTick) -> Initial:
        """theta_0 with a head from federated linear probing. Raises SiteError."""

    def compete(self, job: Job, on_tick: OnTick) -> dict[str, str]:
        """Global models of federated strategies into the pool; why there is none, by the strategy's key."""
