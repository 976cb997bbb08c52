"""Without a terminal a long wait has one line a minute, with what is done and how much time is left; sweeps have it, too."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from fedmerge.errors import first_of
from fedmerge.experiment.sweep import in_their_order
from fedmerge.report.batch_log import Step
from fedmerge.report.terminal import Pace, Terminal, console, in_short, site_table


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_sites_that_wait_count_and_short_runs_have_no_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Terminal(clock=clock).progress("hospitals", expected=4) as bars:
        bars.tick("north", 0, 1000, "run 1")
        for clock.now, done in ((30, 100), (59, 200), (61, 210), (90, 220), (122, 220)):
            bars.tick("north", int(done), 1000, "run 1")
        clock.now = 183
        bars.tick("south", 180, 1000, "run 1")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "hospitals",
        "  5%, about 18 min left: north 21%",
        "  6%, about 35 min left: north 22%",
        "  10%, about 27 min left: north 22%, south 18%",
    ]


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_work_goes_on_where_standard_output_ends(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "stdout", Gone())
    terminal = Terminal(status=tmp_path / "status.json")
    with terminal.progress("hospitals") as bars:
        bars.tick("north", 100, 100, "run 1")
    terminal.say("a line")
    said = f"standard output cannot be written ({os.strerror(number)}); the work goes on, and is seen by: fedmerge watch {tmp_path}"
    assert capsys.readouterr().err == f"fedmerge: {said}\n"
    assert json.loads((tmp_path / "status.json").read_text())["sites"]["north"]["share"] == 1


def test_a_run_outlives_who_reads_its_output() -> None:
    """As `| head -1` does. Nothing that standard output still holds ends the process with an error, either."""
    work = "from fedmerge.report.terminal import Terminal\nt = Terminal()\nfor n in range(20000): t.say(f'{n} ' * 20)"
    run = subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout
    assert run.stderr
    run.stdout.readline()
    run.stdout.close()
    assert run.stderr.read().startswith(b"fedmerge: standard output cannot be written (Broken pipe); the work goes on\n")
    assert run.wait() == 0


def test_of_many_sites_the_first_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Terminal(clock=clock).progress("hospitals") as bars:
        for number in range(9):
            clock.now = 61.0 if number == 8 else 0.0
            bars.tick(f"site_{number}", 1, 10, "run 1")
    assert capsys.readouterr().out.splitlines()[1].endswith("site_3 10% and 5 more")


def test_a_line_does_not_name_a_thousand_experts(capsys: pytest.CaptureFixture[str]) -> None:
    """A thousand hospitals in the title of a phase, which the status repeats for each of them, were 4 MB."""
    names = [f"site_{number}" for number in range(1000)]
    Terminal().experts(dict.fromkeys(names, "0" * 64), dict.fromkeys(names, True))
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("experts: site_0 000000000000 (trained now), site_1")
    assert said.endswith("site_23 000000000000 (trained now) and 976 more")
    assert (first_of(names[:24], 24), first_of(names[:25], 24)) == (", ".join(names[:24]), ", ".join(names[:24]) + " and 1 more")


def test_the_stream_and_what_was_done_before(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    p = np.empty((0, 2), np.float32)
    with Terminal(clock=clock).stream(100, ["mean"]) as bars:
        bars.add([Step(t, "mean", 8, 4, p, 0.0, 1, 0.0) for t in range(40)])
        clock.now = 60
        bars.add([Step(t, "mean", 8, 4, p, 0.0, 1, 0.0) for t in range(40, 50)])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "  stream: batch 40/100 (40%)",
        "  stream: batch 50/100 (50%)",
        "  stream: 50%, about 5 min left: batch 50 of 100",
    ]


def test_nothing_is_said_of_the_time_before_anything_is_done() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.words(0.3) == "30%, too early to tell how long"
    clock.now = 10
    assert pace.words(0.4) == "40%, about 60 s left"
    assert pace.words(0.2) == "20%, too early to tell how long"  # a site with its next task


def test_a_sweep_says_how_far_its_cells_are() -> None:
    first, second = Future[str](), Future[str]()
    second.set_result("failed")
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        first.set_result("")

    assert list(in_their_order([first, second], say, every=0.001)) == ["", "failed"]
    assert said[0].startswith("  50%, about ")
    assert said[0].endswith(" left: 1 of 2 cells are done")


def test_names_in_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """A folder may be called [red] or [/]; Rich takes such a name for a color, or ends with an error."""
    console().print(site_table([{"site": "north", "domains": "[red] 24, [/] 3"}]))
    with Terminal().stream(1, ["[/mean]"]) as bars:
        Terminal().console.print(bars.render())
    shown = capsys.readouterr().out
    assert "[red] 24, [/] 3" in shown
    assert "[/mean]" in shown


def test_what_is_always_right_fails_nowhere() -> None:
    row = {"ranked": True, "accuracy": 1.0, "ci95": [1.0, 1.0], "vs_mean": None, "forwards_per_batch": 1}
    right = {"per_domain": {"north": 1.0, "south": 1.0}, "per_class": {"liver": 1.0, "spleen": 1.0}}
    summary = {"stream": {"samples": 24}, "methods": {"mean": row | right}}
    assert len(in_short(summary)) == 1
    summary["methods"]["mean"] |= {"per_class": {"liver": 1.0, "spleen": 0.5}}
    assert in_short(summary)[1:] == ["It fails most for the class 'spleen' (50.0%)."]
