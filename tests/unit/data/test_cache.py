"""Where decoded images are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmerge.data.cache import folder


def test_a_folder_that_is_named_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("FEDMERGE_CACHE", "~/here")
    assert folder() == Path.home() / "here"
    monkeypatch.setenv("FEDMERGE_CACHE", "")
    assert folder() == tmp_path / "xdg" / "fedmerge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache" / "fedmerge"
