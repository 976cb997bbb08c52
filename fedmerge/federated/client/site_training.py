"""What a hospital does when it is asked: train diverse runs on its own images, select on its own validation split, upload one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fedmerge.data.images import Images, Normalized
from fedmerge.data.partition import Index, own_split
from fedmerge.errors import CheckpointError
from fedmerge.federated.client.diwa import Run, select
from fedmerge.federated.client.temperature import fit_temperature
from fedmerge.federated.client.trainer import LabeledImages, Recipe, accuracy, fit, logits_of, state_of
from fedmerge.federated.messages import MILD, SiteTask, Training
from fedmerge.federated.model import answering, build, normalization, renew_head
from fedmerge.federated.pool.checkpoint import Brought, fitting
from fedmerge.federated.security.audit import Upload
from fedmerge.federated.statistics._base import Ground, State, Statistic
from fedmerge.merging.bank.layout import head_names
from fedmerge.rng import seed_of
from fedmerge.system.process import core_slot


def model_of(task: SiteTask, dropout: float = 0.0) -> nn.Module:
    """A model that the expert of a task fits. Of a hospital with classes of its own, it answers among these alone."""
    model = build(task.model, len(task.classes), dropout, seed=task.seed)
    return answering(model, [name in task.own for name in task.classes]) if task.own else model


OnProgress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and a few words."""


@dataclass(frozen=True)
class Ward:
    """A hospital's images, ready to train on."""

    train: LabeledImages
    validation: LabeledImages
    images: Images


def train_site(task: SiteTask, theta_0: State, on_progress: OnProgress, done: Sequence[Run] | None = None) -> Upload:
    """Train and select, or take what the hospital brings; calibrate, and compute what else is asked for. done: the runs, where they
    are trained already.

    Raises DataError if the hospital's images cannot be used, and CheckpointError if what it brings does not fit.
    """
    ward, model = open_ward(task)
    runs = list(done) if done is not None else train_runs(task, theta_0, ward, on_progress)
    if task.site.expert:
        state = brought(task, model, theta_0).state
    else:
        state = select(runs, task.training.select, lambda state: _validate(model, state, ward.validation))
    own = [run.state for run in runs] or [state]
    model.load_state_dict(state)
    logits = logits_of(model, ward.validation.x)
    shown = ward.images.pixels[_one_of_each(ward.images, task.site.samples)]
    asked = [statistic for statistic in task.uploads if statistic.starts_from != "rounds"]
    if task.site.attack:
        state = task.site.attack.tamper(state, head_names(model))
    return Upload(
        site=task.site.name,
        weights={name: tensor.detach().cpu().clone() for name, tensor in state.items()},
        scalars={
            "n": float(len(ward.train.y)),
            "validation_accuracy": accuracy(logits, ward.validation.y),
            "temperature": fit_temperature(logits, ward.validation.y),
            **{f"runs.{i}.{name}": value for i, run in enumerate(runs) for name, value in _row(run).items()},
        },
        samples=torch.from_numpy(shown.copy()) if task.site.samples else None,
        statistics={one.kind(): measured_statistic(task, one, model, ward, lambda: own, theta_0=theta_0) for one in asked},
        classes=ward.images.classes,
    )


def measure_site(task: SiteTask, kind: str, weights: State, layers: tuple[str, ...], on_progress: OnProgress) -> Upload:
    """One statistic of a hospital that has trained before, from the model that it is sent: see `Statistic.starts_from`."""
    ward, model = open_ward(task)
    model.load_state_dict(weights)
    statistic = next(one for one in task.uploads if one.kind() == kind)
    on_progress(0, 1, f"computes {kind}")

    def states() -> list[State]:
        if task.site.expert:
            return [brought(task, model, weights).state]
        return [run.state for run in train_runs(task, weights, ward, on_progress)]

    found = measured_statistic(task, statistic, model, ward, states, layers)
    on_progress(1, 1, f"computes {kind}")
    return Upload(task.site.name, {}, {}, statistics={kind: found}, classes=ward.images.classes)


def open_ward(task: SiteTask) -> tuple[Ward, nn.Module]:
    """The hospital's images, and a model for its expert, on a GPU if there is one."""
    torch.set_num_threads(task.training.threads)
    ward = admit_images(task)
    model = model_of(task)
    return ward, model.to("cuda" if torch.cuda.is_available() else "cpu")


def train_runs(task: SiteTask, theta_0: State, ward: Ward, on_progress: OnProgress) -> list[Run]:
    """All runs of a hospital: the same for the same task and theta_0."""
    theta_0 = _own_head(task, theta_0)
    return [_train_run(task, number, theta_0, ward, on_progress) for number in range(task.runs)]


def brought(task: SiteTask, model: nn.Module, theta_0: State) -> Brought:
    """The expert that a hospital has trained elsewhere, as the model has it. Raises CheckpointError."""
    own = task.site.expert
    assert own is not None
    if not own.checkpoint:
        told = "expert: found its digest alone; expected the file: only the hospital itself has it"
        raise CheckpointError(f"site '{task.site.name}': {told}", told)
    return fitting(f"site '{task.site.name}'", own, model, task.classes, theta_0)


def train_run(task: SiteTask, theta_0: State, number: int, on_progress: OnProgress) -> Run:
    """One of a hospital's runs by itself, with the same bits as among all of them."""
    ward, _ = open_ward(task)
    return _train_run(task, number, _own_head(task, theta_0), ward, on_progress)


def _own_head(task: SiteTask, theta_0: State) -> State:
    if task.head_init == "per_site_random":
        heads = head_names(build(task.model, len(task.classes), seed=task.seed))
        return renew_head(theta_0, heads, "random", seed_of(task.seed, "head", task.site.name))
    return theta_0


def measured_statistic(
    task: SiteTask,
    statistic: Statistic,
    model: nn.Module,
    ward: Ward,
    runs: Callable[[], list[State]],
    layers: tuple[str, ...] = (),
    theta_0: State | None = None,
) -> State:
    """A statistic of a model on the hospital's training images."""
    x = ward.train.x.to(next(model.parameters()).device)
    seed = seed_of(task.seed, statistic.kind(), task.site.name)
    return statistic.measure(Ground(model.eval(), x, ward.train.y, runs, layers, seed, theta_0))


def admit_images(task: SiteTask) -> Ward:
    """The hospital's own images through its own scanner, split by patients into training and validation."""
    site = task.site
    images = site.images(task.model.geometry, task.seed).of_classes(task.own or task.classes)
    if site.attack:
        images = site.attack.poison(images, site.name, task.seed)
    images = images.of_classes(task.classes)
    train, held = own_split(images, site.name, site.validation, task.seed)
    y = torch.from_numpy(images.labels)

    def labeled(part: Index) -> LabeledImages:
        return LabeledImages(Normalized(images.pixels, part, *normalization(task.model)), y[part])

    return Ward(labeled(train), labeled(held), images)


def _train_run(task: SiteTask, number: int, theta_0: State, ward: Ward, on_progress: OnProgress) -> Run:
    training = task.training
    hyper = training.diversity.hyper_parameters(number, task.site.name, task.seed)
    model = model_of(task, hyper["dropout"])
    model.load_state_dict(theta_0)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    per_epoch, steps = steps_of(training, len(ward.train.y))
    every = max(1, steps // training.evaluations)
    best = Run({}, -1.0, hyper)

    def visit(step: int) -> None:
        nonlocal best
        if step % every == 0 or step == steps:
            reached = accuracy(logits_of(model, ward.validation.x), ward.validation.y)
            if reached > best.accuracy:
                best = Run(state_of(model), reached, hyper)
            done = number * steps + step
            on_progress(done, training.runs * steps, f"run {number + 1}/{training.runs}, epoch {-(-step // per_epoch)}")

    size = int(hyper.get("batch_size", training.batch_size))  # as many steps whatever the size, as in DomainBed
    probed, lp_lr = task.model.probing(steps)
    steps -= probed
    recipe = Recipe(
        hyper["lr"], hyper["weight_decay"], steps, size, training.optimizer, training.schedule,
        training.augment, ward.images.flips, name=f"run {number + 1}", precision=training.precision,
    )  # fmt: skip
    with core_slot():
        if probed:
            alone = replace(recipe, lr=lp_lr, steps=probed)
            _probe(model, ward.train, alone, seed_of(task.seed, "probe", task.site.name, number))
        fit(model, ward.train, recipe, seed_of(task.seed, "run", task.site.name, number), visit)
    return best


def _probe(model: nn.Module, data: LabeledImages, recipe: Recipe, seed: int) -> None:
    """Train the head alone (LP of LP-FT); what else was to be trained, is so again afterwards."""
    heads = set(head_names(model))
    rest = [parameter for name, parameter in model.named_parameters() if name not in heads and parameter.requires_grad]
    for parameter in rest:
        parameter.requires_grad_(False)
    fit(model, data, recipe, seed, lambda step: None)
    for parameter in rest:
        parameter.requires_grad_(True)


def steps_of(training: Training, images: int) -> tuple[int, int]:
    """Steps of an epoch, and of a whole run, for so many training images."""
    per_epoch = max(1, images // training.batch_size)
    return per_epoch, min(training.epochs * per_epoch, training.max_steps)


def _validate(model: nn.Module, state: State, held: LabeledImages) -> float:
    model.load_state_dict(state)
    return accuracy(logits_of(model, held.x), held.y)


def _row(run: Run) -> dict[str, float]:
    """What is told of a run: its rates, and not the size of its batches, which follows from the seed."""
    return {name: run.hyper[name] for name in MILD} | {"validation_accuracy": run.accuracy}


def _one_of_each(images: Images, count: int) -> list[int]:
    """Positions of `count` images, of as many classes as there are."""
    first = [int((images.labels == label).argmax()) for label in sorted(set(images.labels.tolist()))]
    rest = [i for i in range(len(images)) if i not in first]
    return (first + rest)[:count]
