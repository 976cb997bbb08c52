"""`fedmerge keys`: a private key that only its owner can read, and a public key in the site's file, which else stays as it was."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedmerge.cli.site_files import give_key
from fedmerge.errors import FolderError, ScenarioError
from fedmerge.federated.security.signing import VARIABLE, private_key, sign, signed_by
from fedmerge.federated.site import Site
from fedmerge.system.yaml_loader import check, read_yaml
from tests.front_door import fedmerge

TEXT = """\
# A ward.
name: ward      # as scenarios call it

title: >-
  The ward:
  two lines
source: {kind: organ_phantom, images: 60, patients: 12}  # few
# the end"""


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    (tmp_path / "sites").mkdir()
    file = tmp_path / "sites" / "ward.yaml"
    file.write_text(TEXT)
    return file


def read(file: Path) -> Site:
    return check(Site, read_yaml(file), str(file))


def test_only_one_line_is_new(ward: Path, tmp_path: Path) -> None:
    before = read(ward)
    private, public = give_key(ward, tmp_path / "keys", renew=False)
    lines = ward.read_text().splitlines()
    assert [line for line in lines if not line.startswith("public_key:")] == TEXT.splitlines()
    assert read(ward) == before.model_copy(update={"public_key": public})
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE(private.parent.stat().st_mode) == 0o700
    assert private == tmp_path / "keys" / "ward.pem"
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["ward.pem"]


@pytest.mark.parametrize("text", [TEXT.replace("\n", "\r\n"), "name: ward", TEXT.replace("\n\n", "\npublic_key:\n\n")])
def test_other_files_stay_what_they_are(text: str, ward: Path, tmp_path: Path) -> None:
    text += "" if "source" in text else "\nsource: {kind: organ_phantom}"
    ward.write_bytes(text.encode())
    give_key(ward, tmp_path / "keys", renew=False)
    left = b"".join(line for line in ward.read_bytes().splitlines(True) if not line.startswith(b"public_key:"))
    assert left == text.replace("public_key:\n", "").encode()


BLOCKS = """\
---
# its name
"name": 'ward'
# the title

title: "The ward"  # as it is
source:
    kind: organ_phantom
    planes:
      - axial  # one
      - 'coronal'
# the end
"""


@pytest.mark.parametrize(("indent", "dash"), [("    ", "  "), ("  ", "  "), ("  ", ""), ("    ", "")])
def test_blocks_comments_and_quotes_stay(indent: str, dash: str, ward: Path, tmp_path: Path) -> None:
    text = BLOCKS.replace("      - ", f"<<{dash}- ").replace("    ", "<<").replace("<<", indent)
    ward.write_text(text)
    _, public = give_key(ward, tmp_path / "keys", renew=False)
    lines = ward.read_text().splitlines()
    assert lines[3] == f"public_key: {public}"
    assert lines[:3] + lines[4:] == text.splitlines()


def test_a_site_on_one_line_takes_a_key(ward: Path, tmp_path: Path) -> None:
    ward.write_text("{name: ward, source: {kind: organ_phantom}}")
    _, public = give_key(ward, tmp_path / "keys", renew=False)
    assert ward.read_text() == f"{{name: ward, public_key: {public}, source: {{kind: organ_phantom}}}}"


def test_a_key_is_replaced_only_on_purpose(ward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "keys"))
    _, first = give_key(ward, None, renew=False)
    text, secret = ward.read_text(), (tmp_path / "keys" / "ward.pem").read_bytes()
    with pytest.raises(FolderError, match="--renew"):
        give_key(ward, None, renew=False)
    ward.write_text(TEXT)  # the file is back, the private key is still there
    with pytest.raises(FolderError, match=r"ward\.pem: found a private key"):
        give_key(ward, None, renew=False)
    assert (tmp_path / "keys" / "ward.pem").read_bytes() == secret
    ward.write_text(text)
    _, second = give_key(ward, None, renew=True)
    assert second != first
    assert ward.read_text() == text.replace(first, second)
    signature = sign(private_key(read(ward)), b"text")
    assert signed_by(second, b"text", signature)
    assert not signed_by(first, b"text", signature)
    assert not signed_by(second, b"texts", signature)
    for broken in ("", "?", signature[4:], signature[::-1]):
        assert not signed_by(second, b"text", broken)


def test_a_file_that_cannot_take_a_key_costs_none(ward: Path, tmp_path: Path) -> None:
    rest = "source: {kind: organ_phantom}"
    for odd in (f"# lost\n---\nname: ward\n{rest}", f"name: ward\ntitle: ._1\n{rest}", f"name: ward\ntitle: -_\n{rest}"):
        ward.write_text(odd)
        with pytest.raises(FolderError, match="values or comments that rewriting would change"):
            give_key(ward, tmp_path / "keys", renew=False)
        assert ward.read_text() == odd
    ward.write_text("title: x")
    with pytest.raises(ScenarioError, match="name"):
        give_key(ward, tmp_path / "keys", renew=False)
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("key", ["A" * 43, "A" * 42 + "==", "g" * 64, "ab" * 31, "", 7])
def test_what_is_no_key_is_a_problem_of_the_site_file(key: object, ward: Path) -> None:
    ward.write_text(f"{TEXT}\npublic_key: {key!r}\n")
    with pytest.raises(ScenarioError, match="public_key"):
        read(ward)


def test_by_the_command_line(ward: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedmerge", "keys", "sites/ward.yaml"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    assert str(read(ward).public_key) in made.stdout
    assert "PRIVATE" not in made.stdout
    again = fedmerge(tmp_path, "keys", "sites/ward.yaml")
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "--renew" in again.stderr
