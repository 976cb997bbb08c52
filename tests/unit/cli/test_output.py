"""Output: what a terminal cannot show comes with escapes, and ends no command."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from fedmerge.cli.simulate import guarded
from fedmerge.report.terminal import console


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "n\u00e4vus n\\udce4vus"), ("ascii", "n\\xe4vus n\\udce4vus")])
def test_names_that_standard_output_cannot_encode(encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors="strict", write_through=True))

    def verb() -> None:
        console().print("n\u00e4vus n\udce4vus")

    guarded(verb)()
    assert written.getvalue().decode(encoding).split("\n") == [shown, ""]


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "too long": (lambda folder: (folder / ("n" * 300)).mkdir(), "File name too long"),
    "a file": (lambda folder: (folder / "file").mkdir(), "File exists"),
    "below a file": (lambda folder: (folder / "file" / "run").mkdir(), "Not a directory"),
    "a folder": (lambda folder: folder.read_text(), "Is a directory"),
    "a circle": (lambda folder: (folder / "circle" / "x").read_text(), "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_nobody_can_use_is_one_message(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, reason = PLACES[place]
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")

    def verb() -> None:
        work(tmp_path)

    with pytest.raises(typer.Exit) as ended:
        guarded(verb)()
    said = capsys.readouterr().err
    assert ended.value.exit_code == 2
    assert said.endswith(f"cannot be used ({reason}): choose another place\n")
    assert len(said) < 300
