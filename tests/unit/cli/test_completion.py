"""Shells complete verbs and names, at once: nothing slow is imported for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fedmerge.cli.main import plugins


def completed(*words: str) -> list[str]:
    """What bash is told after these words, of which the last has begun."""
    asked = {"_FEDMERGE_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, "-m", "fedmerge"]
    return subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, timeout=120).stdout.split()


def test_verbs_and_methods_are_completed() -> None:
    assert completed("fedmerge", "do") == ["doctor"]
    assert completed("fedmerge", "methods", "dawin") == ["dawin", "dawin_sample"]


@pytest.mark.parametrize(("folder", "name"), [("merging/methods", "eam"), ("data/datasets", "medmnist")])
def test_names_of_plugins_without_their_bases(folder: str, name: str) -> None:
    names = plugins(folder)("")
    assert name in names
    assert not [one for one in names if one.startswith("_")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell: str) -> None:
    command = [sys.executable, "-m", "fedmerge"]
    shown = subprocess.run(
        command, env=os.environ | {"_FEDMERGE_COMPLETE": f"source_{shell}"}, capture_output=True, text=True, timeout=120
    )
    assert "fedmerge" in shown.stdout
    assert shown.returncode == 0
