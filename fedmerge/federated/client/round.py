"""What a hospital does in one round of a federated strategy: train from the global model for its share of steps, and send that."""

from __future__ import annotations

from dataclasses import dataclass

from fedmerge.federated.client.site_training import OnProgress, Ward, measured_statistic, model_of, open_ward, steps_of
from fedmerge.federated.client.trainer import Recipe, accuracy, fit, logits_of, state_of
from fedmerge.federated.messages import SiteTask, Training
from fedmerge.federated.security.audit import Upload
from fedmerge.federated.statistics._base import State
from fedmerge.federated.strategies._base import Strategy
from fedmerge.rng import seed_of

SCALARS = frozenset({"n", "steps", "validation_accuracy"})
"""What a hospital says in a round: its training images, its steps, and how the global model does on its validation images."""


@dataclass(frozen=True)
class Share:
    """The steps of one round: how many came before it, how many it has, and all of all rounds."""

    before: int
    steps: int
    whole: int

    @staticmethod
    def of(strategy: Strategy, number: int, training: Training, images: int) -> Share:
        """Round `number`, from 1. Without local epochs, all rounds together have the steps of all the hospital's own runs."""
        per_epoch, run = steps_of(training, images)
        if strategy.epochs is not None:
            steps = strategy.epochs * per_epoch
            return Share((number - 1) * steps, steps, strategy.rounds * steps)
        whole = training.runs * run
        before, after = (whole * done // strategy.rounds for done in (number - 1, number))
        return Share(before, after - before, whole)


def train_round(task: SiteTask, theta: State, layers: tuple[str, ...], on_progress: OnProgress) -> Upload:
    """One round. layers: the strategy's key and the number of the round. The weights after its last step are sent."""
    strategy: Strategy = next(one for one in task.federated if one.key == layers[0])
    number, (ward, model) = int(layers[1]), open_ward(task)
    hyper = task.training.diversity.hyper_parameters(0, task.site.name, task.seed)
    if hyper["dropout"]:
        device = next(model.parameters()).device
        model = model_of(task, hyper["dropout"]).to(device)
    model.load_state_dict(theta)
    seen = accuracy(logits_of(model, ward.validation.x), ward.validation.y)
    share = Share.of(strategy, number, task.training, len(ward.train.y))
    text = f"{strategy.key}, round {number}/{strategy.rounds}"
    # The seed knows no strategy: those that ask the same of a hospital get the same bits.
    seed = seed_of(task.seed, "round", task.site.name, number)
    fit(
        model,
        ward.train,
        recipe(strategy, number, share, task, hyper, ward),
        seed,
        lambda step: on_progress(step, share.steps, text),
    )
    state = state_of(model)
    scalars = {"n": float(len(ward.train.y)), "steps": float(share.steps), "validation_accuracy": seen}
    told = {one.kind(): measured_statistic(task, one, model, ward, lambda: [state]) for one in strategy.statistics}
    return Upload(task.site.name, state, scalars, statistics=told, classes=ward.images.classes)


def recipe(strategy: Strategy, number: int, share: Share, task: SiteTask, hyper: dict[str, float], ward: Ward) -> Recipe:
    """The scenario's training with what the strategy says otherwise."""
    training, lr_key = task.training, f"{strategy.key}.lr" if strategy.lr else "training.diversity.lr"
    return Recipe(
        lr=strategy.lr or hyper["lr"],
        weight_decay=hyper["weight_decay"],
        steps=share.steps,
        batch_size=training.batch_size,
        optimizer=strategy.optimizer or training.optimizer,
        schedule=training.schedule,
        augment=training.augment,
        flips=ward.images.flips,
        proximal=strategy.proximal,
        before=share.before,
        whole=share.whole,
        name=f"{strategy.key}, round {number}",
        lr_key=f"{lr_key} or {strategy.own_key}" if strategy.own_key and number > 1 else lr_key,
        precision=training.precision,
    )
