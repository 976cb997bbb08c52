"""What a scenario will do, told before it does it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedmerge.plan import load
from fedmerge.preview import preview
from fedmerge.report.picture import duration, histogram, stripes
from tests.front_door import world


def test_counts_are_those_of_the_images(tmp_path: Path) -> None:
    plan = load(world(tmp_path / "here"))
    found = preview(plan, tmp_path / "pool", 2)
    assert [one.site for one in found.sites] == ["north", "south"]
    for one in (*found.sites, found.target):
        assert one.images == sum(one.per_class.values()) == sum(one.per_domain.values()) == 80
        assert one.groups == 16
    assert all(one.train + one.validation == one.images for one in found.sites)
    assert (found.target.train, found.trained) == (0, {"north": None, "south": None})
    assert found.mix.samples + found.mix.unused == 80
    np.testing.assert_allclose(found.mix.classes.sum(1), 1)
    np.testing.assert_allclose(found.mix.domains.sum(1), 1)
    assert found.cost.training_s > 0
    assert not (tmp_path / "pool").exists()


def test_the_picture() -> None:
    shares = np.stack([np.linspace(1, 0, 8), np.linspace(0, 1, 8)], 1)
    assert stripes(["a", "long"], shares, columns=4) == ["   a |█▓▒░|", "long |░▒▓█|"]
    assert stripes(["a"], np.array([[0.0], [0.5], [1.0]])) == ["a | ▒█|"]
    assert histogram({"a": 0, "b": 1, "c": 8}) == "·▂█"
    assert [duration(s) for s in (0.2, 89, 600, 7200)] == ["1 s", "89 s", "10 min", "2.0 h"]
