"""A simulated attack changes what it should and nothing else, and belongs to what determines an expert."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedmerge.data.images import Images
from fedmerge.errors import DataError
from fedmerge.federated.attacks._base import ATTACKS
from fedmerge.federated.attacks.backdoor import Backdoor
from fedmerge.federated.attacks.scale_head import ScaleHead
from fedmerge.federated.attacks.shuffled_labels import ShuffledLabels
from fedmerge.federated.client.site_training import admit_images, train_site
from fedmerge.federated.messages import Initial, SiteTask
from fedmerge.federated.model import build
from fedmerge.federated.pool.experts import fingerprint
from fedmerge.federated.site import Site
from fedmerge.merging.bank.layout import head_names

Hospital = Callable[..., SiteTask]


def images(n: int = 60, classes: int = 5) -> Images:
    rng = np.random.default_rng(0)
    index = np.arange(n)
    pixels = rng.integers(20, 200, (n, 16, 16, 1), dtype=np.uint8)
    return Images(pixels, index % classes, index * 0, index, tuple("abcde"[:classes]), ("x",), False)


def attacking(task: SiteTask, attack: object) -> SiteTask:
    site = Site.model_validate({**task.site.model_dump(mode="json"), "attack": attack})
    return task.model_copy(update={"site": site})


def test_a_site_file_names_an_attack_and_reads_back() -> None:
    assert set(ATTACKS.names) == {"backdoor", "scale_head", "shuffled_labels"}
    for attack in ("shuffled_labels", {"scale_head": {"factor": 7}}, None):
        site = Site.model_validate({"name": "x", "source": {"kind": "organ_phantom"}, "attack": attack})
        assert Site.model_validate(site.model_dump(mode="json")) == site
    assert ScaleHead(factor=7).words == "scale_head (factor 7.0)"


def test_labels_are_dealt_out_anew_and_pixels_stay() -> None:
    of = images()
    found = ShuffledLabels().poison(of, "x", 0)
    assert np.array_equal(found.pixels, of.pixels)
    assert np.array_equal(np.bincount(found.labels), np.bincount(of.labels))
    assert 0.05 < (found.labels == of.labels).mean() < 0.5  # one in five by chance
    assert np.array_equal(found.labels, ShuffledLabels().poison(of, "x", 0).labels)
    assert not np.array_equal(found.labels, ShuffledLabels().poison(of, "y", 0).labels)


def test_classes_get_each_others_names() -> None:
    of = images()
    found = ShuffledLabels(among="classes").poison(of, "x", 0)
    names = {(int(old), int(new)) for old, new in zip(of.labels, found.labels, strict=True)}
    assert len(names) == 5  # one new name for each class
    assert {new for _, new in names} == set(range(5))
    assert all(old != new for old, new in names)


def test_a_backdoor_stamps_a_corner_of_a_share_of_the_images() -> None:
    of = images()
    attack = Backdoor(target=2, share=0.25, severity=3, corner="upper-left")
    found = attack.poison(of, "x", 0)
    changed = (found.pixels != of.pixels).any((1, 2, 3))
    assert changed.sum() == 15
    assert (found.labels[changed] == 2).all()
    assert np.array_equal(found.labels[~changed], of.labels[~changed])
    assert (found.pixels[changed, :2, :2] == 255).all()  # 0.125 of 16 pixels
    untouched = found.pixels.copy()
    untouched[:, :2, :2] = of.pixels[:, :2, :2]
    assert np.array_equal(untouched, of.pixels)
    with pytest.raises(DataError, match="expected a class from 0 to 4") as error:
        Backdoor(target=5).poison(of, "x", 0)
    assert error.value.told == "attack.backdoor.target: found 5; expected a class from 0 to 4"


def test_a_scaled_head_is_the_honest_expert_but_for_its_head(hospital: Hospital, initial: Initial) -> None:
    task = hospital("north", runs=1, epochs=1)
    honest = train_site(task, initial.weights, lambda *_: None)
    scaled = train_site(attacking(task, {"scale_head": {"factor": 20}}), initial.weights, lambda *_: None)
    heads = head_names(build(task.model, len(task.classes)))
    for name, tensor in honest.weights.items():
        assert torch.equal(scaled.weights[name], 20 * tensor if name in heads else tensor)
    assert scaled.scalars == honest.scalars  # it declares what it had before


def test_an_attack_is_part_of_the_fingerprint_only_when_there_is_one(hospital: Hospital) -> None:
    task = hospital("north")
    prints = {fingerprint(attacking(task, attack)) for attack in (None, "scale_head", {"scale_head": {"factor": 2}}, "backdoor")}
    assert fingerprint(task) in prints
    assert len(prints) == 4


def test_images_are_poisoned_where_they_are_admitted(hospital: Hospital) -> None:
    task = hospital("north")
    honest, poisoned = admit_images(task), admit_images(attacking(task, {"backdoor": {"share": 1.0, "target": 3}}))
    assert set(poisoned.images.labels.tolist()) == {3}
    assert (poisoned.images.pixels[:, -1, -1] == 255).all()
    assert not (honest.images.pixels[:, -1, -1] == 255).all()
