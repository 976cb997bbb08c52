"""The house keeps its rules: imports point down, nothing goes in a circle, foreign packages stay behind their seams.

A new file needs no edit here: the rules are about rooms and folders.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections import defaultdict
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "fedmerge").rglob("*.py"))

LAYERS = (
    "__main__ simulate",
    "cli",
    "experiment",
    "adaptation",
    "federated report stream",
    "merging data",
    "system registry",
    "rng errors",
)
"""From the top down. A room may import rooms of the layers below its own, and no other."""

SEAMS = {
    "flwr": ("federated/flower", "federated/strategies", "cli/deployment"),
    "ray": ("adaptation/ray",),
    "timm": ("federated/model",),
    "open_clip": ("federated/model", "federated/server"),
}
"""A foreign package, and the only files or folders that may name it."""

SLOW = {"flwr", "ray", "timm", "open_clip", "torchvision", "matplotlib", "sklearn", "torchmetrics"}
MOST_ENTRIES = 12
PLUGINS = (
    "data/corruptions",
    "data/datasets",
    "merging/methods",
    "stream/schedules",
    *(f"federated/{name}" for name in ("strategies", "statistics", "attacks", "defenses")),
)
"""Folders where one file is one plug-in: as many entries as there are plug-ins."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@cache
def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at module level) of every import, those under TYPE_CHECKING and inside functions included."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name if name in MODULES else node.module, id(node) in top) for name in names]
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "fedmerge"


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name not in ("__pycache__", "__init__.py")]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    layer = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
    here = room(module_of(path))
    if here == "fedmerge":  # the public API: nothing is imported before it is used
        assert not [name for name, top in imports_of(path) if top and name.startswith("fedmerge")]
        return
    there = {room(name) for name, _ in imports_of(path) if name.startswith("fedmerge.")} - {here}
    assert not [name for name in there if layer[name] <= layer[here]]


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_circles_in_a_folder(folder: Path) -> None:
    """Among the entries of every folder, where a folder below counts as one."""
    depth, graph = len(folder.relative_to(ROOT).parts), defaultdict(set)
    for path in FILES:
        if path.is_relative_to(folder) and path.name != "__init__.py":
            here = module_of(path).split(".")
            targets = [name.split(".") for name, _ in imports_of(path) if name in MODULES]
            own = {there[depth] for there in targets if there[:depth] == here[:depth] and len(there) > depth}
            graph[here[depth]] |= own - {here[depth]}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_folders_can_be_overlooked() -> None:
    for folder in {path.parent for path in FILES}:
        plugins = any(folder == ROOT / "fedmerge" / name for name in PLUGINS)
        most = 16 if folder == ROOT / "fedmerge" else MOST_ENTRIES
        assert plugins or len(entries(folder)) <= most, folder


def test_plugin_folders_have_their_base_inside() -> None:
    for name in PLUGINS:
        assert (ROOT / "fedmerge" / name / "_base.py").is_file(), name


def test_no_public_name_stands_twice() -> None:
    homes = defaultdict(list)
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                homes[node.name].append(module)
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_foreign_packages_live_behind_their_seam(path: Path) -> None:
    for package, homes in SEAMS.items():
        named = [name for name, _ in imports_of(path) if name.split(".")[0] == package]
        assert not named or any(path.is_relative_to(ROOT / "fedmerge" / home) for home in homes)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_slow_packages_are_imported_where_they_are_used(path: Path) -> None:
    assert not {name.split(".")[0] for name, top in imports_of(path) if top} & SLOW


def test_merging_is_usable_without_the_rest() -> None:
    allowed = {"torch", "pydantic", "pydantic_core", "fedmerge", "typing_extensions"}
    for path in FILES:
        if room(module_of(path)) == "merging":
            foreign = {name.split(".")[0] for name, _ in imports_of(path)}
            assert foreign <= allowed | sys.stdlib_module_names, path


def test_no_drawers_for_everything() -> None:
    forbidden = {"utils", "util", "helpers", "helper", "common", "misc", "core", "internal"}
    assert not [path for path in FILES if forbidden & set(path.relative_to(ROOT).with_suffix("").parts)]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_functions_stay_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            assert node.end_lineno - body[0].lineno < 50, f"{path}: {node.name}"


def test_every_dependency_says_why() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    lists = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    for name, asked in lists.items():
        block = text[(start := text.index(f"\n{name} = [")) : text.index("\n]", start)]
        entries = [line for line in block.splitlines() if line.startswith('    "')]
        assert len(entries) == len(asked), name
        assert not [line for line in entries if "# " not in line], name


def test_every_module_says_what_it_is() -> None:
    assert not [path for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))]
