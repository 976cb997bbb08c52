"""What is not installed: one clear message at every door, and nothing that merging needs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from fedmerge.errors import EXTRAS, MissingExtra, extras_named

ROOT = Path(__file__).resolve().parents[2]
ALL = [package for packages in EXTRAS.values() for package in packages]


def without(packages: list[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that cannot import these packages."""
    begin = f"import runpy, sys; sys.modules.update(dict.fromkeys({packages!r}))\n"
    return subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, timeout=240, cwd=ROOT)


MODULE = "sys.argv = [{0!r}, {1}]; runpy.run_module({0!r}, run_name='__main__', alter_sys=True)"
DOORS = {
    "simulate without typer": ("typer", MODULE.format("fedmerge.simulate", "'--help'")),
    "console script without typer": ("typer", MODULE.format("fedmerge", "'--help'")),
    "simulate without yaml": ("yaml", MODULE.format("fedmerge.simulate", "'scenarios/organs.yaml'")),
    "plan without yaml": ("yaml", MODULE.format("fedmerge", "'plan', 'scenarios/organs.yaml'")),
}


@pytest.mark.parametrize(("package", "code"), DOORS.values(), ids=DOORS)
def test_a_door_names_the_extra(package: str, code: str) -> None:
    ended = without([package], code)
    assert ended.returncode == 2
    assert (
        ended.stderr == f"fedmerge: the package '{package}' is not installed; install it with: pip install 'fedmerge[simulation]'\n"
    )


def test_run_names_the_extra_in_an_error_that_is_also_an_import_error() -> None:
    code = """
import fedmerge
try:
    fedmerge.run("scenarios/organs.yaml")
except ImportError as error:
    assert isinstance(error, fedmerge.FedmergeError)
    print(error)
"""
    ended = without(["yaml"], code)
    assert ended.stdout.strip().endswith("pip install 'fedmerge[simulation]'"), ended.stderr


def test_merging_needs_no_extra() -> None:
    code = """
import torch, fedmerge
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.methods._base import METHODS, load_method
for name in METHODS.names:
    METHODS.load(name)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
bank = Bank.of(model, [model.state_dict(), model.state_dict()], head=["1.weight", "1.bias"])
load_method("mean").merge(bank)
"""
    ended = without(ALL, code)
    assert ended.returncode == 0, ended.stderr


def test_an_import_error_of_our_own_stays_what_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module") as caught, extras_named():
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert not isinstance(caught.value, MissingExtra)


def test_every_package_is_brought_by_the_extra_that_the_message_names() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = packages_distributions()
    for extra, packages in EXTRAS.items():
        listed = " ".join(asked[extra]).lower()
        for package in packages:
            known = {name.lower() for name in names.get(package, [package])} - {"markupsafe"}
            assert not known or any(name in listed for name in known), package
