"""What the documents name is there, and what they show works."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fedmerge.data.datasets._base import Geometry, Source
from fedmerge.experiment.experiment import load_experiment
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.methods._base import METHODS, Method, Static
from fedmerge.registry import Folder
from tests.conftest import Net, expert_states

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TOP = "fedmerge|tests|docs|examples|benchmarks|scenarios|sites"
IN_CODE = re.compile(rf"(?<![\w/.\"'])(?:{TOP})/[\w./*-]+")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
IGNORED_BY_HABIT = set(
    "target build dist lib lib64 env venv parts sdist var wheels eggs develop-eggs downloads htmlcov cover instance site".split()  # noqa: SIM905
)
"""Folders that the usual .gitignore of a Python project hides."""


def shown(page: str, name: str) -> str:
    """The code block that follows the first mention of a file, fences excluded."""
    after = (ROOT / page).read_text().partition(f"`{name}`")[2]
    found = re.search(r"```\w+\n(.*?)```", after, re.DOTALL)
    assert found
    return found[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_document_names_is_there(page: Path) -> None:
    text = page.read_text()
    made = {"fedmerge/merging/methods/median.py", "fedmerge/data/datasets/npz_file.py"}  # as an example
    made |= {"sites/my_hospital.yaml", "scenarios/my_question.yaml"}
    named = {found.rstrip(".,") for found in IN_CODE.findall(text)} - made
    missing = sorted(name for name in named if not list(ROOT.glob(name.rstrip("/"))))
    missing += [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert not missing


def test_nothing_of_the_package_is_hidden_by_the_usual_gitignore() -> None:
    listed = subprocess.run(["git", "ls-files", "fedmerge"], cwd=ROOT, capture_output=True, text=True)
    files = listed.stdout.split() or [str(path.relative_to(ROOT)) for path in (ROOT / "fedmerge").rglob("*.py")]
    assert not [file for file in files if IGNORED_BY_HABIT & set(Path(file).parts)]


def added(package: str, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a file that CONTRIBUTING.md shows into a plug-in folder, for this test."""
    place = f"{package.replace('.', '/')}/{name}.py"
    (folder / f"{name}.py").write_text(shown("CONTRIBUTING.md", place))
    module: ModuleType = importlib.import_module(package)
    monkeypatch.setattr(module, "__path__", [*module.__path__, str(folder)])


def test_the_method_of_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = "fedmerge.merging.methods"
    added(package, tmp_path, "median", monkeypatch)
    median = Folder(package, Method, "method").load("median")()
    states = expert_states(3)
    bank = Bank.of(Net(), states)
    assert isinstance(median, Static)
    merged = bank.state_dict(median.merge(bank))
    for name, value in Net().named_parameters():
        assert torch.equal(merged[name], torch.stack([state[name] for state in states]).median(0).values), (name, value.shape)


def test_the_data_set_of_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = "fedmerge.data.datasets"
    added(package, tmp_path, "npz_file", monkeypatch)
    np.savez(tmp_path / "here.npz", images=np.zeros((4, 20, 20), np.uint8), labels=np.array([0, 1, 0, 1]))
    folder = Folder(package, Source, "data source")  # type: ignore[type-abstract]
    source = folder.load("npz_file")(path=str(tmp_path / "here.npz"), names=("a", "b"))
    images = source.load(Geometry(16, 3), "me", 0)
    assert not source.check() and source.domains() == ("here",)
    assert images.pixels.shape == (4, 16, 16, 3) and len(source.identity("me", 0)) == 64
    assert len(folder.load("npz_file")(path="nowhere.npz", names=("a", "b")).check()) == 1


def test_the_hospital_and_the_scenario_of_the_guide_are_valid(tmp_path: Path) -> None:
    for name in ("sites", "scenarios"):
        (tmp_path / name).mkdir()
    for site in (ROOT / "sites").glob("*.yaml"):
        (tmp_path / "sites" / site.name).write_text(site.read_text())
    for name in ("sites/my_hospital.yaml", "scenarios/my_question.yaml"):
        (tmp_path / name).write_text(shown("CONTRIBUTING.md", name))
    plan = load_experiment(tmp_path / "scenarios" / "my_question.yaml")
    assert [site.name for site in plan.sites] == ["axial", "coronal", "my_hospital"]


@pytest.mark.slow
def test_the_documentation_is_built_without_a_warning(tmp_path: Path) -> None:
    """`make docs`: every link leads somewhere, every method has its section, and no page loads anything from another machine."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    methods = (tmp_path / "reference" / "methods.html").read_text()
    assert [name for name in METHODS.names if f'id="{name}"' not in methods] == []
    foreign = re.compile(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="https?://')
    assert [page.name for page in tmp_path.rglob("*.html") if foreign.search(page.read_text())] == []
