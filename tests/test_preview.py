"""What a scenario will do, told before it does it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedmerge.plan import load
from fedmerge.preview import preview
from fedmerge.report.picture import duration, histogram, stripes
from tests.test_run import world


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


@pytest.mark.slow
def test_the_verb_tells_what_is_in_the_pool(tmp_path: Path) -> None:
    folder = world(tmp_path / "here").parents[1]

    def fedmerge(*words: str) -> str:
        command = [sys.executable, "-c", "from fedmerge.cli import main; main()", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, env=environment)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    fedmerge("simulate", "scenarios/tiny.yaml", "--experts-only", "--quiet")
    after = fedmerge("plan", "scenarios/tiny.yaml")
    assert after.count("in the pool") == 2
    assert "never trains" in after
    assert "nobody trains" in after
