"""What the documents name is there, and what they show works."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml

import fedmerge
from fedmerge.data.corruptions._base import SHIFTS
from fedmerge.data.datasets._base import SOURCES, Geometry, Source
from fedmerge.experiment.experiment import load_experiment
from fedmerge.experiment.scenario import json_schema
from fedmerge.federated.attacks._base import ATTACKS
from fedmerge.federated.defenses._base import DEFENSES
from fedmerge.federated.statistics._base import STATISTICS
from fedmerge.federated.strategies._base import STRATEGIES
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.methods._base import METHODS, Method, Static
from fedmerge.registry import Folder
from fedmerge.stream.schedules._base import SCHEDULES
from tests.conftest import Net, expert_states
from tests.front_door import SCENARIO, world

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
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
    with monkeypatch.context() as patched:
        patched.setattr("fedmerge.merging.functional.METHODS", Folder(package, Method, "method"))
        assert doctest.testmod(importlib.import_module(f"{package}.median"), globs={}) == (0, 4)


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
    assert methods.count('viewBox="0 0 360 ') == len(METHODS.names)  # a figure of each
    assert methods.count("&gt;&gt;&gt; ") > len(METHODS.names)  # and an example
    blocks = (tmp_path / "reference" / "building-blocks.html").read_text()
    assert blocks.count("Examples:") > 50
    pages = {page: page.read_text() for page in tmp_path.rglob("*.html")}
    foreign = re.compile(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="https?://')
    assert [page.name for page, text in pages.items() if foreign.search(text)] == []
    own = re.compile(r'href="([^":#/][^":#]*)[#"]')
    links = {(page.name, link, page.parent / link) for page, text in pages.items() for link in own.findall(text)}
    assert [(name, link) for name, link, file in links if not file.exists()] == []  # mkdocs passes links to files it leaves out


PUBLISHED = [
    name for page in (ROOT / "docs" / "reference").glob("*.md") for name in re.findall(r"(?m)^::: (\S+)", page.read_text())
]
"""What the reference shows: modules, and names of modules."""

PLUGINS = (METHODS, SCHEDULES, SHIFTS, SOURCES, STRATEGIES, STATISTICS, ATTACKS, DEFENSES)
SECTION = re.compile(r"^(\w+)\n-{3,}\n", re.MULTILINE)
ENTRY = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: : .*)?$", re.MULTILINE)
Named = ast.FunctionDef | ast.ClassDef


def public_names() -> list[tuple[str, Named]]:
    """(file: name, definition) of every function and class without an underscore in `merging/` and `stream/`, and of every name
    that the reference shows, among which are those of `fedmerge.__all__`. Plug-ins have a test of their own."""
    found = []
    for path in sorted((ROOT / "fedmerge").rglob("*.py")):
        here = path.relative_to(ROOT)
        module = ".".join(here.with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, Named) and not node.name.startswith("_"):
                inside = here.parts[1] in ("merging", "stream")
                if inside or module in PUBLISHED or f"{module}.{node.name}" in PUBLISHED:
                    found.append((f"{here}: {node.name}", node))
    return found


def test_the_reference_shows_all_that_the_package_offers() -> None:
    assert set(fedmerge.__all__) <= {name.rpartition(".")[2] for name in PUBLISHED}


def sections(text: str) -> dict[str, str]:
    """The NumPy sections of a docstring."""
    parts = SECTION.split(text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def arguments(node: Named) -> dict[str, str]:
    """What a docstring must tell of: arguments of a function or constructor, else fields; each with its annotation."""
    made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    if isinstance(node, ast.ClassDef) and not made:
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]
        if any(isinstance(part.value, ast.Call) and ast.unparse(part.value.func) == "Field" for part in fields):
            return {}  # of pydantic: see the test of plug-ins
        named = {part.target.id: ast.unparse(part.annotation) for part in fields if isinstance(part.target, ast.Name)}
        named |= {
            part.targets[0].id: "" for part in node.body if isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name)
        }
        return {name: kind for name, kind in named.items() if not name.startswith("_") and "ClassVar" not in kind}
    given = (made[0] if isinstance(node, ast.ClassDef) else node).args
    listed = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    several = [("*", given.vararg), ("**", given.kwarg)]
    named = {one.arg: ast.unparse(one.annotation) for one in listed if one.annotation}
    return named | {stars + one.arg: "" for stars, one in several if one}


def protocol(node: Named) -> bool:
    """Whether nobody makes one: it says what others must have."""
    return isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)


def lacking(node: Named) -> list[str]:
    """What a public docstring lacks to be complete, in NumPy form."""
    text = ast.get_docstring(node) or ""
    found, wanted = sections(text), arguments(node)
    told = found.get("Parameters", "") + "\n" + found.get("Attributes", "")
    entries = {name for line in ENTRY.findall(told) for name in line.split(", ")}
    lacks = [] if text.strip() and not SECTION.match(text) else ["a summary"]
    lacks += [f"parameter {name}" for name in wanted if name not in entries]
    lacks += [f"no such parameter: {name}" for name in entries - set(wanted)]
    for name, kind in wanted.items():
        said = re.search(rf"^(?:.*, )?{re.escape(name)}(?:, .*)? : .*\n((?:[ ]{{4}}.*\n?)+)", told, re.MULTILINE)
        if re.fullmatch(r"Tensor( \| None)?|NDArray\[.*\]", kind) and not (said and re.search(r"\(.*\)|scalar", said[1])):
            lacks.append(f"shape of {name}")
    if isinstance(node, ast.FunctionDef):
        if ast.unparse(node.returns or ast.Constant(None)) != "None" and not {"Returns", "Yields"} & set(found):
            lacks.append("what it returns")
        if any(isinstance(part, ast.Raise) for part in ast.walk(node)) and "Raises" not in found:
            lacks.append("what it raises")
    if not protocol(node) and ">>> " not in found.get("Examples", ""):
        lacks.append("an example")
    return lacks


def test_every_public_docstring_is_complete() -> None:
    """In NumPy form: a summary, every argument, shapes of tensors, what comes back, what is raised, and an example."""
    assert {name: lacks for name, node in public_names() if (lacks := lacking(node))} == {}


def test_every_plug_in_describes_itself_and_each_of_its_keys() -> None:
    unsaid = []
    for folder in PLUGINS:
        for name in folder.names:
            kind = folder.load(name)
            unsaid += [name] if not (kind.__doc__ or "").strip() else []
            unsaid += [f"{name}.{key}" for key, field in kind.model_fields.items() if not field.description and key != "kind"]
    assert unsaid == []
    assert [name for name in METHODS.names if not METHODS.load(name).paper] == []


def test_public_methods_of_public_classes_say_what_they_do() -> None:
    classes = [(place, node) for place, node in public_names() if isinstance(node, ast.ClassDef)]
    inside = [(place, part) for place, node in classes for part in node.body if isinstance(part, ast.FunctionDef)]
    assert [f"{place}.{part.name}" for place, part in inside if part.name[0] != "_" and not ast.get_docstring(part)] == []


WITH_EXAMPLES = [path for path in sorted((ROOT / "fedmerge").rglob("*.py")) if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(ROOT / "fedmerge")))
def test_the_examples_in_docstrings_work(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by itself, as a reader would type it, with its own imports; in a folder with a small `scenarios/organs.yaml`."""
    small = {**SCENARIO, "name": "organs", "methods": ["mean", "expert", "eam"], "training": {"epochs": 1}}
    world(tmp_path)
    (tmp_path / "scenarios" / "organs.yaml").write_text(yaml.safe_dump(small))
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    ended = doctest.testmod(module, globs={"__name__": "__main__"})
    assert ended.attempted > 0 and ended.failed == 0
    assert "+SKIP" not in path.read_text()


def test_every_key_of_a_scenario_and_of_a_site_file_is_described() -> None:
    """The descriptions are what docs/reference shows, and editors by the schema."""
    unsaid = []
    for document in ("scenario", "site"):
        schema = json_schema(document)
        for part, one in {document: schema, **schema["$defs"]}.items():
            keys = {key: field for key, field in one.get("properties", {}).items() if key != "kind"}
            unsaid += [f"{part}.{key}" for key, field in keys.items() if not field.get("description")]
    assert unsaid == []
