"""Randomness by name."""

from __future__ import annotations

import subprocess
import sys

from fedmerge.rng import generator, seed_of


def test_every_name_matters_and_so_does_their_order() -> None:
    seeds = {seed_of(0), seed_of(1), seed_of(0, "a"), seed_of(0, "a", "b"), seed_of(0, "b", "a"), seed_of(0, "ab")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_same_in_another_process() -> None:
    code = "from fedmerge.rng import generator; print(generator(3, 'site', 1).integers(1 << 40))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(there) == generator(3, "site", 1).integers(1 << 40)
