"""What a scenario will do, before it does it: who holds what, who must train, what the stream looks like, what it will cost.

Images are loaded in a process for each site, from which only counts come back.

What rounds a scenario's federated strategies have still to do, and the local steps that they ask of hospitals.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.data.corrupted_images import Gallery
from fedmerge.errors import ScenarioError
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
from fedmerge.system.process import owners

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
    """Estimates for this machine: seconds of training (all that must, and all rounds) and of the stream, and bytes at the peak."""

    training_s: float
    stream_s: float
    peak_bytes: float


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


def preview(experiment: Experiment, pool: Path, cores: int) -> Preview:
    """Count, look, and time a few steps; nothing is trained, and nothing written but caches of images and an untrained theta_0.

    Raises DataError if images cannot be used, and ScenarioError if an event comes after the end of the stream.
    """
    scenario, everyone = experiment.scenario, [*experiment.sites, experiment.target]
    geometry = scenario.model.geometry
    with owners(min(cores, len(everyone)), tasks_each=1) as workers:
        mixed = workers.submit(mix_of, experiment)
        counted = [workers.submit(census, site, geometry, scenario.seed, True, experiment.classes) for site in experiment.sites]
        counted += [workers.submit(census, experiment.target, geometry, scenario.seed, False, experiment.target_classes)]
        found = [one.result() for one in counted]
        mix = mixed.result()
    if late := past_end(scenario.events, len(mix.classes), f"scenario '{scenario.name}'"):
        raise ScenarioError(late)
    initial = known_start(experiment, pool)
    trained = in_pool(experiment, pool, initial)
    rounds = ahead(experiment, pool, initial, found[:-1])
    model = build(scenario.model, len(experiment.classes), seed=scenario.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    left = [one for one in found[:-1] if not trained[one.site]]
    cost = estimate(experiment, model, found[:-1], Left(proxy_steps(experiment, pool), left, rounds), mix, cores)
    return Preview(experiment, tuple(found[:-1]), found[-1], trained, mix, parameters, cost, rounds)


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
    if experiment.scenario.initialization.head_init == "fed_lp" or proxy_steps(experiment, pool):
        return None
    return make_theta_0(experiment, RunOptions(out=pool, pool=pool), Terminal(quiet=True))


def in_pool(experiment: Experiment, pool: Path, initial: Initial | None) -> dict[str, bool | None]:
    """Which experts are there. Which one a site needs depends on theta_0, so nobody knows while that has to be trained."""
    if initial is None:
        return dict.fromkeys([site.name for site in experiment.sites])
    return {site.name: ExpertPool(pool).has(site_task(experiment, number, initial)) for number, site in enumerate(experiment.sites)}


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

    def side_by_side(seconds: Sequence[float]) -> float:
        return max([sum(seconds) / at_once, *seconds], default=0.0)

    validation = {site.site: forward * site.validation / 32 for site in sites}
    own = [
        training.runs * (steps_of(training, site.train)[1] * step + training.evaluations * validation[site.site])
        for site in left.sites
    ]
    trains = left.first_steps * step + side_by_side(own)
    for one in left.rounds:
        trains += side_by_side([steps * step + one.asked * validation[site] for site, steps in one.left.items()])
    forwards = (len(experiment.sites) * 3 + len(scenario.methods) + len(scenario.federated)) * len(mix.classes)
    rows = (len(experiment.sites) + 2 + len(scenario.federated)) * sum(parameter.numel() for parameter in model.parameters()) * 4
    pixels = mix.samples * size * size * channels
    busy = max([1, len(left.sites), *(len(one.left) for one in left.rounds if one.asked)])
    return Cost(trains, forwards * forward, rows * 2 + pixels + WORKER_BYTES * (4 + min(at_once, busy)))


def _seconds(model: torch.nn.Module, batch: int, image: tuple[int, ...], backward: bool = True) -> float:
    """Least time of a few steps, or forwards, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, times = torch.randn(batch, *image), []
    for _ in range(TRIALS):
        began = time.perf_counter()
        with torch.set_grad_enabled(backward):
            logits = model(x)
            if backward:
                logits.logsumexp(1).mean().backward()
                model.zero_grad()
        times.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
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
            return "known when theta_0 is there"
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
