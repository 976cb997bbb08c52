"""Files and folders appear whole or not at all, and leave nothing behind when they fail."""

from __future__ import annotations

import os
import re
import resource
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedmerge.federated.pool.tensor_file import save
from fedmerge.system.files import at_home, atomic, atomic_folder, atomic_write, see_that_file_writable, write_secret


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_text_keeps_its_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    atomic_write(file, b"old")
    atomic_write(file, "n\u00f6rth\r\n")
    assert file.read_bytes() == "n\u00f6rth\r\n".encode()
    assert names(tmp_path) == ["site.yaml"]


def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "site.yaml", tmp_path / "site.yaml"
    real.write_text("old")
    link.symlink_to(real)
    atomic_write(link, "new")
    assert link.is_symlink() and real.read_text() == "new"
    assert names(real.parent) == ["site.yaml"]


def test_a_home_of_nobody_stays_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert at_home("~/x") == tmp_path / "x"
    assert at_home("${HOME}/x") == tmp_path / "x"
    assert at_home("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")


def test_what_fails_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    atomic_write(file, "old")
    with pytest.raises(ValueError, match="stop"), atomic(file) as draft:
        draft.write_text("half")
        raise ValueError("stop")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["summary.json"]
    with pytest.raises(OSError, match="never"), atomic(tmp_path / "never" / "file") as draft:
        draft.write_text("no folder")


def test_a_secret_is_its_owners_before_it_has_a_byte(tmp_path: Path) -> None:
    with atomic(tmp_path / "token", 0o600) as draft:
        assert (stat.S_IMODE(draft.stat().st_mode), draft.stat().st_size) == (0o600, 0)
        draft.write_bytes(b"secret")
    write_secret(tmp_path / "keys" / "key.pem", b"secret")
    for file in (tmp_path / "token", tmp_path / "keys" / "key.pem"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert file.read_bytes() == b"secret"


def test_many_writers_of_one_file_leave_one_of_theirs(tmp_path: Path) -> None:
    file, contents = tmp_path / "said.json", [str(number) * 50_000 for number in range(8)]
    threads = [threading.Thread(target=atomic_write, args=(file, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_text() in contents
    assert names(tmp_path) == ["said.json"]


def test_a_folder_appears_whole_and_the_first_stays(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "expert") as draft:
            (draft / "manifest.json").write_text(content)
            assert draft.parent == tmp_path
    assert (tmp_path / "expert" / "manifest.json").read_text() == "first"
    with pytest.raises(ValueError, match="stop"), atomic_folder(tmp_path / "other") as draft:
        raise ValueError("stop")
    assert names(tmp_path) == ["expert"]


@pytest.mark.parametrize(("umask", "files", "folder"), [(0o002, 0o664, 0o775), (0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_follow_the_umask_whoever_writes(tmp_path: Path, umask: int, files: int, folder: int) -> None:
    """safetensors writes files for their owner alone, and a group that shares a pool could read nothing."""
    before = os.umask(umask)
    try:
        with atomic(tmp_path / "theta_0.safetensors") as draft:
            save_file({"weight": torch.ones(2)}, draft)
        with atomic_folder(tmp_path / "expert") as draft:
            save_file({"weight": torch.ones(2)}, draft / "expert.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "expert").stat().st_mode) == folder
    for file in (tmp_path / "theta_0.safetensors", tmp_path / "expert" / "expert.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == files


@pytest.fixture
def small_files() -> Iterator[None]:
    """As on a full disk, for this process: no file may grow beyond some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_what_a_disk_has_no_room_for_is_named(tmp_path: Path) -> None:
    file, entry = tmp_path / "summary.json", tmp_path / "entry"
    with pytest.raises(OSError, match=re.escape(f"'{file}'")):
        atomic_write(file, "x" * 2000)
    with pytest.raises(OSError, match=re.escape(f"'{entry / 'expert.safetensors'}'")), atomic_folder(entry) as draft:
        save(draft / "expert.safetensors", {"weight": torch.zeros(2000)})
    with pytest.raises(OSError, match=re.escape(f"'{tmp_path / 'gone' / 'file'}'")):
        atomic_write(tmp_path / "gone" / "file", "")
    assert names(tmp_path) == []


def test_a_device_is_written_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.append((tmp_path / "pipe").read_text()))
    reader.start()
    see_that_file_writable(tmp_path / "pipe", "--out", "mirage.json")
    atomic_write(tmp_path / "pipe", "said")
    reader.join()
    assert heard == ["said"]
    assert names(tmp_path) == ["pipe"]
