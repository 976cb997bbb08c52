"""The file that says what a process is at: whole at every moment, seldom written, and never in the way."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedmerge.system import status_file
from fedmerge.system.status_file import StatusFile


def test_facts_are_kept_and_what_changes_all_the_time_is_written_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_file, "EVERY_S", 3600.0)
    status = StatusFile(tmp_path / "status.json")
    status.put(phase="a")
    status.put_below("sites", "north", 0.1)
    assert json.loads((tmp_path / "status.json").read_text()) == {"phase": "a"}
    status.put_below("sites", "north", 1.0, now=True)
    assert json.loads((tmp_path / "status.json").read_text()) == {"phase": "a", "sites": {"north": 1.0}}
    status.put_below("sites", "south", 0.2)
    status.put(phase="b")
    assert json.loads((tmp_path / "status.json").read_text()) == {"phase": "b", "sites": {"north": 1.0, "south": 0.2}}


def test_nobody_depends_on_it(tmp_path: Path) -> None:
    """No folder, and no path at all: a run goes on."""
    for path in (tmp_path / "none" / "status.json", None):
        status = StatusFile(path)
        status.put(phase="a")
        status.put_below("sites", "north", 1, now=True)
        assert status.facts == {"phase": "a", "sites": {"north": 1}}
    assert not list(tmp_path.iterdir())


def test_threads_may_share_it(tmp_path: Path) -> None:
    status = StatusFile(tmp_path / "status.json")
    with ThreadPoolExecutor(8) as several:
        list(several.map(lambda n: status.put_below("sites", str(n), n, now=True), range(50)))
    assert json.loads((tmp_path / "status.json").read_text())["sites"] == {str(n): n for n in range(50)}
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]
