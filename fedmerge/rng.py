"""Randomness by name: a generator for (root seed, names...) derived by hashing, and no global random state anywhere."""

from __future__ import annotations

import hashlib

import numpy as np


def seed_of(root: int, *names: str | int) -> int:
    """A 63-bit seed that depends on the root seed and on every name, and on nothing else."""
    text = "\x1f".join([str(root), *(str(name) for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(root: int, *names: str | int) -> np.random.Generator:
    """The numpy generator of (root, names...)."""
    return np.random.Generator(np.random.PCG64(seed_of(root, *names)))
