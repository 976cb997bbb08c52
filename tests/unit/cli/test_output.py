"""Output: what a terminal cannot show comes with escapes, and ends no command."""

from __future__ import annotations

import io
import sys

import pytest

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
