"""`fedmerge doctor`: what is ready and what is not, one line each; nothing is made, and nothing heavy is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedmerge.cli.doctor import Checked, examine
from tests.front_door import fedmerge


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "FEDMERGE_DATA"):
        monkeypatch.delenv(name, raising=False)


def found(folder: Path) -> dict[str, Checked]:
    return {one.what: one for one in examine(folder / "pool", folder / "runs")}


def test_one_line_for_each_thing_and_no_folder_is_made(tmp_path: Path) -> None:
    ended = fedmerge(tmp_path, "doctor")
    lines = ended.stdout.splitlines()
    assert ended.returncode == 0, ended.stdout
    assert lines[-1].endswith("backend local can run")
    assert all(line[:5].strip() in ("ok", "warn") for line in lines[:-1])
    named = {line[5:19].strip() for line in lines}
    assert {"python", "cores", "memory", "fedmerge", "[simulation]", "flower", "ray", "gpu", "runs", "pool", "cache"} <= named
    assert not list(tmp_path.iterdir())


def test_what_ray_cannot_do_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 90)))
    monkeypatch.setenv("FEDMERGE_DATA", str(tmp_path / "gone"))
    ended = fedmerge(tmp_path, "doctor")
    assert ended.returncode == 0
    assert "warn ray sockets   RAY_TMPDIR: found a path of" in ended.stdout
    assert "Set RAY_TMPDIR=/tmp" in ended.stdout
    assert "warn FEDMERGE_DATA" in ended.stdout
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "where nobody answers" in found(tmp_path)["ray cluster"].found


@pytest.mark.parametrize("option", ["--out", "--pool"])
def test_a_folder_that_cannot_be_is_a_failure(tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("")
    ended = fedmerge(tmp_path, "doctor", option, "file/below")
    assert ended.returncode == 2
    assert "file' is a file. Move it, or choose another folder" in ended.stdout
    assert ended.stdout.splitlines()[-1].startswith("1 failures")


@pytest.mark.parametrize(
    ("package", "of", "what"),
    [("torch", "fail", "fedmerge"), ("timm", "fail", "[simulation]"), ("ray", "warn", "ray"), ("pydicom", "warn", "[dicom]")],
)
def test_what_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, of: str, what: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    one = found(tmp_path)[what]
    assert one.of == of
    assert "pip install 'fedmerge" in one.mend


def test_nothing_heavy_is_imported_without_a_gpu(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fedmerge.cli.doctor import examine; here = Path(sys.argv[1]);"
        "gpu = [one for one in examine(here, here) if one.what == 'gpu'];"
        "print(sorted({'torch', 'ray', 'flwr', 'timm', 'matplotlib'} & set(sys.modules)), gpu[0].found.startswith('none'))"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=os.environ, timeout=120)
    assert ended.stdout.strip() == "[] True" or "False" in ended.stdout, ended.stderr
