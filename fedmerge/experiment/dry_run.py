"""What a scenario will do, before it does it: who holds what, who must train, what the stream looks like, what it will cost.

Images are loaded in a process for each site, from which only counts come back.

What rounds a scenario's federated strategies have still to do, and the local steps that they ask of hospitals.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.data.corrupted_images import Gallery
from fedmerge.errors import FolderError, ScenarioError
from fedmerge.experiment.experiment import Experiment, RunOptions
from fedmerge.experiment.training_phase import make_theta_0, site_task
from fedmerge.federated.client.dataset_summary import Census, census
from fedmerge.federated.client.round import Share
from fedmerge.federated.client.site_log import kept_privately
from fedmerge.federated.client.site_training import steps_of
from fedmerge.federated.messages import Initial, Training
from fedmerge.federated.model import build
from fedmerge.federated.pool.experts import ExpertPool
from fedmerge.federated.pool.global_models import GlobalPool
from fedmerge.federated.server.initialization import Proxy, kept_proxy
from fedmerge.federated.strategies._base import Strategy
from fedmerge.report.terminal import Terminal
from fedmerge.stream.events import past_end
from fedmerge.stream.stream import Stream
from fedmerge.system.process import one_thread, owners

WORKER_BYTES = 0.42 * 2**30
"""What a process with torch, Ray and Flower in it takes before it does anything, as measured on Linux."""

TRIALS = 3


@dataclass(frozen=True)
class Mix:
    """The stream's batches: shares of classes (T, C) and of domains (T, D), number of images, and of those left out."""

    classes: NDArray[np.float64]
    domains: NDArray[np.float64]
    domain_names: tuple[str, ...]
    samples: int
    unused: int
    index_sha256: str


@dataclass(frozen=True)
class Cost:
    """Estimates for this machine: seconds of theta_0, of sites that must train, of rounds and of the stream, and bytes at the peak.

    at_once: how many sites train side by side.
    """

    first_s: float
    sites_s: dict[str, float]
    rounds_s: float
    stream_s: float
    peak_bytes: float
    at_once: int

    @property
    def training_s(self) -> float:
        """All that must be trained."""
        return self.first_s + abreast([*self.sites_s.values()], self.at_once) + self.rounds_s

    @staticmethod
    def of_all(costs: Sequence[Cost]) -> Cost:
        """Of runs one after the other with one pool: every site trains once."""
        own = {site: seconds for one in costs for site, seconds in one.sites_s.items()}
        rounds, streams = sum(one.rounds_s for one in costs), sum(one.stream_s for one in costs)
        return Cost(costs[0].first_s, own, rounds, streams, max(one.peak_bytes for one in costs), costs[0].at_once)


def abreast(seconds: Sequence[float], at_once: int) -> float:
    """How long it takes to do these, so many at a time."""
    return max([sum(seconds) / at_once, *seconds], default=0.0)


@dataclass(frozen=True)
class Preview:
    """What `fedmerge plan` shows. trained: site -> whether its expert is in the pool; None while theta_0 is not there."""

    experiment: Experiment
    sites: tuple[Census, ...]
    target: Census
    trained: dict[str, bool | None]
    mix: Mix
    parameters: int
    cost: Cost
    rounds: tuple[Ahead, ...] = ()


def previews(experiments: Sequence[Experiment], pool: Path, cores: int) -> list[Preview]:
    """Count, look, and time a few steps; nothing is trained, and nothing written but caches of images and an untrained theta_0.

    Of several experiments of one scenario, the images of a site are counted once. Raises DataError if images cannot be used,
    FolderError if an expert in the pool is damaged, or the pool is a file, and ScenarioError if an event comes after the end of
    the stream.
    """
    if pool.exists() and not pool.is_dir():
        raise FolderError(f"--pool: found '{pool}', a file; expected a folder, or a name that is free")
    trains = {site.name for one in experiments for site in one.sites}
    everyone = {(site.name, one.scenario.trains_on(site)): site for one in experiments for site in one.sites}
    everyone |= {(one.target.name, one.target_classes): one.target for one in experiments}
    geometry, seed = experiments[0].scenario.model.geometry, experiments[0].scenario.seed
    with owners(min(cores, len(everyone)), tasks_each=1) as workers:
        mixed = [workers.submit(mix_of, one) for one in experiments]
        counted = {
            (name, classes): workers.submit(census, site, geometry, seed, name in trains, classes)
            for (name, classes), site in everyone.items()
        }
        found = {key: one.result() for key, one in counted.items()}
        mixes = [one.result() for one in mixed]
    sound: set[Path] = set()
    return [_preview(one, pool, cores, found, mix, sound) for one, mix in zip(experiments, mixes, strict=True)]


def _preview(
    experiment: Experiment, pool: Path, cores: int, counted: dict[tuple[str, tuple[str, ...]], Census], mix: Mix, sound: set[Path]
) -> Preview:
    scenario = experiment.scenario
    if late := past_end(scenario.events, len(mix.classes), f"scenario '{scenario.name}'"):
        raise ScenarioError(late)
    found = tuple(counted[site.name, scenario.trains_on(site)] for site in experiment.sites)
    streamed = counted[experiment.target.name, experiment.target_classes]
    target = replace(streamed, train=0, validation=0)
    initial = known_start(experiment, pool)
    trained = in_pool(experiment, pool, initial, sound)
    rounds = ahead(experiment, pool, initial, found)
    model = build(scenario.model, len(experiment.classes), seed=scenario.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    bring = {site.name for site in experiment.sites if site.expert}
    left = [one for one in found if not trained[one.site] and one.site not in bring]
    cost = estimate(experiment, model, found, Left(proxy_steps(experiment, pool), left, rounds), mix, cores)
    return Preview(experiment, found, target, trained, mix, parameters, cost, rounds)


def mix_of(experiment: Experiment) -> Mix:
    """The stream as the target will see it, in numbers."""
    scenario, target = experiment.scenario, experiment.target
    with kept_privately(target.name):  # `census` tells the same
        loaded = target.source.load(scenario.model.geometry, target.name, scenario.seed).of_classes(experiment.target_classes)
    images = Gallery(loaded, scenario.stream.conditions(), target.name, scenario.seed)
    stream = Stream(images, scenario.stream, target.name, scenario.seed)
    classes = np.stack([np.bincount(labels, minlength=len(loaded.classes)) / len(labels) for labels in stream.answers().labels])
    return Mix(classes, stream.truth, images.domain_names, stream.samples, stream.unused, stream.index_sha256)


def known_start(experiment: Experiment, pool: Path) -> Initial | None:
    """theta_0, unless it has to be trained first."""
    start = experiment.scenario.initialization
    if (start and start.head_init == "fed_lp") or proxy_steps(experiment, pool):
        return None
    return make_theta_0(experiment, RunOptions(out=pool, pool=pool), Terminal(quiet=True))


def in_pool(experiment: Experiment, pool: Path, initial: Initial | None, sound: set[Path]) -> dict[str, bool | None]:
    """Which experts are there. Which one a site needs depends on theta_0, so nobody knows while that has to be trained.

    sound: entries that were read whole before, to which those of this experiment are added. Raises FolderError if one is damaged,
    as a run does.
    """
    if initial is None:
        return dict.fromkeys(site.name for site in experiment.sites)
    held = ExpertPool(pool)
    found: dict[str, bool | None] = {}
    for number, site in enumerate(experiment.sites):
        task = site_task(experiment, number, initial)
        found[site.name] = held.has(task)
        if found[site.name] and (entry := held.entry(task)) not in sound:
            held.load(task)
            sound.add(entry)
    return found


def proxy_steps(experiment: Experiment, pool: Path) -> int:
    """Training steps of theta_0 that have still to be done."""
    scenario = experiment.scenario
    spec = scenario.initialization
    if not isinstance(spec, Proxy) or kept_proxy(spec, scenario.model, scenario.seed, pool).exists():
        return 0
    images = getattr(spec.source, "images", 0)
    return spec.epochs * max(1, images // spec.batch_size)


@dataclass(frozen=True)
class Left:
    """What has still to be trained: steps of theta_0, sites without an expert, and rounds of federated strategies."""

    first_steps: int
    sites: Sequence[Census]
    rounds: Sequence[Ahead]


def estimate(experiment: Experiment, model: torch.nn.Module, sites: Sequence[Census], left: Left, mix: Mix, cores: int) -> Cost:
    """From a few timed steps on random images; hospitals train side by side. What strategies ask beside steps is not in it."""
    scenario = experiment.scenario
    training = scenario.training
    size, channels = scenario.model.geometry
    step = _seconds(model, training.batch_size, (channels, size, size))
    forward = _seconds(model, min(32, int(mix.samples / len(mix.classes)) or 1), (channels, size, size), backward=False)
    at_once = max(1, cores // training.threads)

    validation = {site.site: forward * site.validation / 32 for site in sites}
    own = {
        site.site: training.runs * (steps_of(training, site.train)[1] * step + training.evaluations * validation[site.site])
        for site in left.sites
    }
    rounds = sum(
        abreast([steps * step + one.asked * validation[site] for site, steps in one.left.items()], at_once) for one in left.rounds
    )
    forwards = (len(experiment.sites) * 3 + len(scenario.methods) + len(scenario.federated)) * len(mix.classes)
    rows = (len(experiment.sites) + 2 + len(scenario.federated)) * sum(parameter.numel() for parameter in model.parameters()) * 4
    pixels = mix.samples * size * size * channels
    busy = max([1, len(left.sites), *(len(one.left) for one in left.rounds if one.asked)])
    peak = rows * 2 + pixels + WORKER_BYTES * (4 + min(at_once, busy))
    return Cost(left.first_steps * step, own, rounds, forwards * forward, peak, at_once)


@one_thread()
def _seconds(model: torch.nn.Module, batch: int, image: tuple[int, ...], backward: bool = True) -> float:
    """Least time of a few steps, or forwards, on one thread."""
    x, times = torch.randn(batch, *image), []
    for _ in range(TRIALS):
        began = time.perf_counter()
        with torch.set_grad_enabled(backward):
            logits = model(x)
            if backward:
                logits.logsumexp(1).mean().backward()
                model.zero_grad()
        times.append(time.perf_counter() - began)
    return min(times)


@dataclass(frozen=True)
class Ahead:
    """One strategy. done: rounds in the pool; None while theta_0, on which that depends, is not there.

    steps: local steps of all rounds, the mean over hospitals. left: those of the rounds that are left, by hospital. Where a
    fraction of the hospitals is drawn, each has its expected share. asked: how often a hospital is asked in the rounds left.
    """

    key: str
    rounds: int
    done: int | None
    steps: float
    left: dict[str, float]
    asked: float

    @property
    def words(self) -> str:
        """How far it is."""
        if self.done is None:
            return "known after theta_0"
        if self.done == self.rounds:
            return "in the pool"
        return f"{self.done} of {self.rounds} rounds in the pool" if self.done else "to train"


def ahead(experiment: Experiment, pool: Path, initial: Initial | None, sites: Sequence[Census]) -> tuple[Ahead, ...]:
    """All strategies. initial: theta_0, if it is there. sites: what every hospital holds; those that join take no part."""
    founders = [site for site in sites if site.site in experiment.founders]
    tasks = [site_task(experiment, number, initial) for number in range(len(founders))] if initial else []
    known = GlobalPool(pool, tasks) if tasks else None
    return tuple(
        _ahead(one, known.done(one) if known else None, experiment.scenario.training, founders)
        for one in experiment.scenario.federated
    )


def _ahead(strategy: Strategy, done: int | None, training: Training, founders: Sequence[Census]) -> Ahead:
    drawn = strategy.chosen(len(founders)) / len(founders)

    def steps(site: Census, first: int) -> float:
        return drawn * sum(Share.of(strategy, number, training, site.train).steps for number in range(first, strategy.rounds + 1))

    first = (done or 0) + 1
    whole = [steps(site, 1) for site in founders]
    left = {site.site: steps(site, first) for site in founders}
    return Ahead(strategy.key, strategy.rounds, done, sum(whole) / len(whole), left, drawn * (strategy.rounds + 1 - first))
