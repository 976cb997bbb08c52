"""The house keeps its rules: doors open downwards only, seams are at home, no cycles, no drawers for everything."""

from __future__ import annotations

import ast
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "fedmerge").rglob("*.py"))

# Each room, and the rooms it may open a door to.
DOORS = {
    "errors": set(),
    "seeds": set(),
    "egress": set(),
    "secret": set(),
    "folder": {"errors"},
    "configuration": {"errors"},
    "data": {"seeds", "errors", "folder"},
    "attack": {"data", "folder"},
    "attacks": {"attack", "data", "seeds", "errors"},
    "site": {"attack", "data", "folder"},
    "merge": {"errors", "folder"},
    "stream": {"data", "seeds", "errors", "folder"},
    "experts": {"data", "site", "seeds", "egress", "secret", "errors", "folder", "merge"},
    "report": {"errors"},
    "target": {"merge", "stream", "data", "site", "experts", "report", "seeds", "egress", "errors", "folder"},
    "scenario": {"site", "merge", "stream", "experts", "folder", "errors"},
    "overrides": {"settings", "errors"},
    "rows": {"scenario", "errors"},
    "plan": {"overrides", "rows", "scenario", "data", "site", "configuration", "experts", "merge", "stream", "errors"},
    "run_folder": {"plan", "scenario", "site", "errors"},
    "federate": {"plan", "run_folder", "experts", "report", "errors"},
    "course": {"plan", "report", "stream", "target", "errors"},
    "consumption": {"course", "plan", "run_folder", "report", "stream", "experts", "target"},
    "run": {"consumption", "course", "federate", "plan", "run_folder", "site", "experts", "target", "report", "errors"},
    "deployment": {"plan", "run", "run_folder", "configuration", "experts", "site", "errors"},
    "outline": {"configuration", "site", "errors"},
    "simulate": {"plan", "run", "run_folder", "settings", "errors"},
    "settings": {"experts", "errors"},
    "rounds_ahead": {"experts", "federate", "plan"},
    "preview": {"rounds_ahead", "errors", "plan", "data", "federate", "run_folder", "experts", "stream", "report"},
    "outlook": {"preview", "report"},
    "diagnose": {"report", "consumption", "run_folder", "federate", "experts", "merge", "target", "errors"},
    "mirage": {"experts", "merge", "report", "errors"},
    "sweep": {"plan", "settings", "configuration", "report", "target", "errors"},
    "keys": {"configuration", "experts", "site", "errors"},
    "certificates": {"secret", "errors"},
    "catalog": {"merge", "target", "folder"},
    "__main__": {"cli"},
    "cli": {"simulate", "scenario", "catalog", "sweep", "mirage", "diagnose", "plan", "preview", "outlook", "settings", "errors"}
    | {"certificates", "keys", "outline"},
}
# A whole foreign package, and the files or folders that may name it.
SEAMS = {"flwr": ("experts/flower", "deployment"), "ray": ("adaptation/ray",), "timm": ("experts/backbone.py",)}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at module level) of every import, TYPE_CHECKING blocks excluded."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found: list[tuple[str, bool]] = []
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            known = {module_of(file) for file in FILES}
            found += [(name if name in known else node.module, id(node) in top) for name in names]
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "fedmerge"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_doors_open_downwards_only(path: Path) -> None:
    here = room(module_of(path))
    if here == "fedmerge":
        assert not [name for name, _ in imports_of(path) if name.startswith("fedmerge")]
        return
    there = {room(name) for name, _ in imports_of(path) if name.startswith("fedmerge.")}
    assert there - {here} <= DOORS[here]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_foreign_packages_live_behind_their_seam(path: Path) -> None:
    for package, homes in SEAMS.items():
        named = [name for name, _ in imports_of(path) if name.split(".")[0] == package]
        assert not named or any(path.is_relative_to(ROOT / "fedmerge" / home) for home in homes)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_slow_packages_are_imported_where_they_are_used(path: Path) -> None:
    at_module_level = {name.split(".")[0] for name, top in imports_of(path) if top}
    assert not at_module_level & {"flwr", "ray", "timm", "torchvision", "matplotlib", "sklearn", "torchmetrics", "opacus"}


def test_merge_is_usable_without_the_rest() -> None:
    allowed = {"torch", "pydantic", "fedmerge"}
    for path in FILES:
        if room(module_of(path)) == "merge":
            foreign = {name.split(".")[0] for name, _ in imports_of(path)}
            assert foreign <= allowed | sys.stdlib_module_names, path


def test_no_cycles() -> None:
    known = {module_of(path) for path in FILES}
    graph = {
        module_of(path): {name for name, top in imports_of(path) if top and name in known} - {module_of(path)} for path in FILES
    }
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) >= known


def test_no_drawers_for_everything() -> None:
    forbidden = {"utils", "util", "helpers", "helper", "common", "misc", "core", "internal"}
    assert not [path for path in FILES if forbidden & set(path.relative_to(ROOT).with_suffix("").parts)]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 220
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{path}: {node.name}"


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
