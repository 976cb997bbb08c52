"""What `fedmerge watch` shows of a run's folder at any moment of its life, and what its server answers."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedmerge.cli.watch import HOST, Server, serving
from fedmerge.errors import FolderError, UserError
from fedmerge.report.batch_log import Step
from fedmerge.report.pages.watch import SILENT_S, Watched
from fedmerge.report.pages.watch_sweep import WatchedSweep, is_sweep
from fedmerge.report.plots.layout import MOST_POINTS
from fedmerge.system.process import free_lock
from tests import front_door

NOW = time.time()
"""Before any file of these tests is written."""


def folder(path: Path, status: str = "running", **facts: object) -> Path:
    """A run's folder as the run writes it."""
    path.mkdir(exist_ok=True)
    manifest = {"status": status, "scenario": "toy", "seed": 0, "backend": "local", "started": "2026-01-01T00:00:00+00:00"}
    (path / "manifest.json").write_text(json.dumps({**manifest, **facts}))
    sites = "[{name: north, title: <b>North</b>}, {name: south}]"
    (path / "scenario.yaml").write_text(f"name: toy\nquestion: Is it?\nsites: {sites}\ntarget: {{name: mercy}}\n")
    return path


def told(path: Path, batches: int = 4, **facts: object) -> None:
    """What the run is at, and how its stream is made."""
    stream = {
        "batches": batches,
        "done": 0,
        "methods": {"mean": {"kind": "static", "ranked": True}, "eam": {"kind": "adaptive", "ranked": True}},
        "course": [[0, ["north", "south"]]],
        "mix": {"names": ["axial", "coronal"], "at": list(range(batches)), "shares": [[0.25, 0.75]] * batches},
    }
    (path / "status.json").write_text(json.dumps({"phase": "target: toy", "since": NOW - 60, "stream": stream, **facts}))


def lines(path: Path, *batches: int, right: int = 6, mode: str = "a") -> None:
    """Steps of two methods on some batches of 8 images: the mean is right for `right` of them, eam for one more."""
    with (path / "batches.jsonl").open(mode) as file:
        for t in batches:
            for name, more, shares in (("mean", 0, None), ("eam", 1, (0.25, 0.75))):
                step = Step(t, name, 8, right + more, np.empty((0, 2), np.float32), 0.5, 1, 0.1, shares, shares)
                file.write(step.line() + "\n")


def test_it_follows_a_stream_line_by_line(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    told(run)
    lines(run, 0)
    with (run / "batches.jsonl").open("a") as file:
        file.write('{"t": 1, "method": "mean", "n": 8, "corr')  # being written
    watched = Watched(run, now=lambda: NOW)
    assert (watched.done, watched.batches) == (1, 4)
    assert watched.left() == "about 3 min left"
    page = watched.page()
    assert "75.0" in page
    assert "87.5" in page
    assert "+12.5" in page
    assert "Running: target: toy." in page
    assert "&lt;b&gt;North" in page
    assert "north 0.25" in page
    assert "axial 0.25" in page
    whole = (run / "batches.jsonl").read_bytes()
    (run / "batches.jsonl").write_bytes(whole[: whole.rfind(b"\n") + 1])
    watched.look()
    lines(run, 1, 2, 3, right=4)
    watched.look()
    assert watched.done == 4
    assert watched.rows["mean"].accuracy() == (6 + 3 * 4) / 32
    assert watched.rows["mean"].accuracy(3) == 0.5
    assert watched.left() == ""


def test_no_batch_counts_twice_when_a_run_goes_on(tmp_path: Path) -> None:
    """A resumed run cuts its lines to the last snapshot, and writes the batches after it again."""
    run = folder(tmp_path / "run")
    told(run)
    lines(run, 0, 1, 2)
    watched = Watched(run, now=lambda: NOW)
    folder(run, started="2026-01-02T00:00:00+00:00")
    lines(run, 0, mode="w")
    lines(run, 1, 2, 3, right=2)
    watched.look()
    assert watched.done == 4
    assert watched.rows["mean"].accuracy() == (6 + 3 * 2) / 32
    lines(run, 0, mode="w")  # begun anew by the same run: shorter than what was read
    watched.look()
    assert watched.done == 1


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    (run / "batches.jsonl").write_text('{"t": 0, "method": "me\n[1]\n')
    lines(run, 0)
    assert Watched(run).done == 1


def test_a_long_stream_takes_no_more_memory_than_its_plot(tmp_path: Path) -> None:
    run, batches = folder(tmp_path / "run"), 3 * MOST_POINTS + 1
    told(run, batches)
    lines(run, *range(batches))
    watched = Watched(run, now=lambda: NOW)
    row = watched.rows["eam"]
    assert watched.done == batches
    assert len(row.seen) <= MOST_POINTS
    assert row.accuracy() == 7 / 8
    _, shares, names = row.coefficients("head") or (None, None, None)
    assert names == ["north", "south"]
    np.testing.assert_allclose(shares, [[0.25, 0.75]] * len(shares))
    assert len(watched.page()) < 200_000


@pytest.mark.parametrize(
    ("status", "facts", "said"),
    [
        ("done", {}, "Done."),
        ("failed", {"reason": "site 'north': its images cannot be used"}, "site &#39;north&#39;: its images cannot be used"),
        ("failed", {}, "without a word"),
    ],
)
def test_it_works_when_the_run_has_ended(tmp_path: Path, status: str, facts: dict[str, object], said: str) -> None:
    run = folder(tmp_path / "run", status, **facts)
    assert said in Watched(run).page()
    told(run)
    lines(run, 0, 1)
    page = Watched(run).page()
    assert said in page
    assert "report.html" not in page
    (run / "report.html").write_text("<p>")
    assert ("Open the report" in Watched(run).page()) == (status == "done")


def test_a_run_whose_process_is_gone_is_told_from_one_that_is_silent(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    lock = free_lock(run / ".lock")
    assert lock is not None
    late = (run / "manifest.json").stat().st_mtime + SILENT_S + 1
    assert Watched(run, now=lambda: late).state() == "running"  # it thinks
    lock.release()
    assert Watched(run, now=lambda: late - SILENT_S).state() == "running"  # it has just written
    gone = Watched(run, now=lambda: late)
    assert gone.state() == "cut off"
    assert "Cut off" in gone.page()
    assert free_lock(run / ".lock") is not None  # and is free for whoever goes on with it
    (run / ".lock").unlink()
    assert Watched(run, now=lambda: late).state() == "cut off"


def test_hospitals_as_they_are(tmp_path: Path) -> None:
    run, phase = folder(tmp_path / "run"), "hospitals: north, south train"
    busy = {"north": {"share": 0.5, "text": "run 1/2, epoch 3", "phase": phase}}
    (run / "status.json").write_text(json.dumps({"phase": phase, "since": NOW - 30, "sites": busy}))
    watched = Watched(run, now=lambda: NOW)
    north, south = watched.hospitals()
    assert (north["share"], north["text"]) == (0.5, "run 1/2, epoch 3")
    assert (south["share"], south["text"]) == (None, "waits")
    assert watched.left() == "about 30 s left"
    folder(run, trained={"north": True}, absent={"south": "no answer in 60 s"})
    (run / "status.json").write_text(json.dumps({"phase": "defenses", "since": NOW, "sites": busy}))
    watched.look()
    north, south = watched.hospitals()
    assert (north["share"], north["text"]) == (1.0, "its expert was trained in this run")
    assert south["text"] == "stays away: no answer in 60 s"


def test_no_run_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"none: found nothing; expected the folder of a run or of a sweep"):
        Watched(tmp_path / "none")
    with pytest.raises(FolderError, match=r"found no manifest.json in it"):
        Watched(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match=r"found a file; expected the folder of a run or of a sweep"):
        Watched(tmp_path / "file")
    run = folder(tmp_path / "run")
    for name, content in {"manifest.json": "{", "scenario.yaml": "a: [", "status.json": "{"}.items():
        before = (run / name).read_text() if (run / name).exists() else "{}"
        (run / name).write_text(content)
        if name == "status.json":
            Watched(run)  # nobody depends on it
        else:
            with pytest.raises(FolderError, match="cannot be read as a run"):
                Watched(run)
        (run / name).write_text(before)


def sweep_of(path: Path, *names: str, **facts: object) -> Path:
    """A sweep's folder as the sweep writes it."""
    (path / "cells").mkdir(parents=True, exist_ok=True)
    told = {"state": "running", "sweep": "toy", "began": 0, "cells": names, "left": names, "phase": "streams, 2 at a time"}
    (path / "status.json").write_text(json.dumps({**told, "since": NOW - 60, **facts}))
    return path


def test_a_sweep_shows_all_its_runs_and_the_river_of_the_one_that_runs(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path / "sweep", "a", "b", "gamma=5-séed0", "d", "e", failed={"e": "no space left"})
    whole = folder(sweep / "cells" / "a", "done")
    (whole / "summary.json").write_text("{}")
    folder(sweep / "cells" / "b", "done")  # it trained the experts, and its stream comes later
    run = folder(sweep / "cells" / "gamma=5-séed0")
    told(run)
    lines(run, 0, 1)
    watched = WatchedSweep(sweep, now=lambda: NOW)
    assert [(cell["state"], cell["share"], cell["text"]) for cell in watched.cells] == [
        ("done", 1.0, "done"),
        ("waits", None, "waits; its experts are in the pool"),
        ("running", 0.5, "batch 2 of 4"),
        ("waits", None, "waits"),
        ("failed", None, "failed: no space left"),
    ]
    assert watched.left() == "about 2 min left"  # 60 s for 1.5 of 5
    page = watched.page()
    for said in ("1 of 5 runs are done, 1 running, 1 failed, about 2 min left", "eam: head", "south 0.75", "batch 2 of 4"):
        assert said in page
    assert 'href="cells/gamma%3D5-s%C3%A9ed0/"' in page
    lines(run, 2)
    watched.look()
    assert watched.cells[2]["share"] == 0.75
    folder(run, "failed", reason="<b>no luck")
    watched.look()
    assert "failed: &lt;b&gt;no luck" in watched.page()


def test_a_sweep_that_goes_on_does_not_take_what_is_left_for_what_is_done(tmp_path: Path) -> None:
    """An earlier sweep with other images left a finished run, and one that failed: both wait until this sweep comes to them."""
    sweep = sweep_of(tmp_path / "sweep", "a", "b", "c", left=["a", "b"], began=NOW)
    for name, status in {"a": "done", "b": "failed", "c": "done"}.items():
        (folder(sweep / "cells" / name, status) / "summary.json").write_text("{}")
    watched = WatchedSweep(sweep, now=lambda: NOW)
    assert [cell["state"] for cell in watched.cells] == ["waits", "waits", "done"]


def test_a_sweep_whose_process_is_gone_and_one_that_has_ended(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path / "sweep", "a")
    lock = free_lock(sweep / ".lock")
    assert lock is not None
    late = (sweep / "status.json").stat().st_mtime + SILENT_S + 1
    assert WatchedSweep(sweep, now=lambda: late).state() == "running"
    lock.release()
    assert "Cut off" in WatchedSweep(sweep, now=lambda: late).page()
    (sweep / "sweep.html").write_text("<p>")
    sweep_of(sweep, "a", state="done")
    assert "Open the table and the plots" in WatchedSweep(sweep).page()
    sweep_of(sweep, "a", state="failed", reason="cell a: no space left")
    assert "cell a: no space left" in WatchedSweep(sweep).page()


def test_a_sweep_of_an_older_version_and_no_sweep(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    assert is_sweep(tmp_path)
    with pytest.raises(FolderError, match=r"found no run of a sweep in it; expected the folder of a run or of a sweep"):
        WatchedSweep(tmp_path)
    run = folder(tmp_path / "cells" / "seed0", "done")
    assert not is_sweep(run)
    watched = WatchedSweep(tmp_path)
    assert [cell["name"] for cell in watched.cells] == ["seed0"]
    assert watched.state() == "done"
    (run / "manifest.json").write_text("{")  # and nothing else is hidden by it
    watched.look()
    assert "cannot be read as a run" in watched.cells[0]["text"]
    (tmp_path / "status.json").write_text("[]")
    watched.look()


def test_the_server_answers_about_a_sweep_and_each_of_its_runs(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path / "sweep", "gamma=5-séed0", "later")
    run = folder(sweep / "cells" / "gamma=5-séed0")
    told(run)
    lines(run, 0)
    folder(sweep / "cells" / "a stranger")
    with serving(sweep, 0) as server:
        here = "/cells/gamma%3D5-s%C3%A9ed0/"
        assert "Progress of every run" in asked(server, "/")[2]
        page = asked(server, here)[2]
        assert "Progress of every hospital" in page
        assert 'href="../../"' in page
        for path in ("/watch.js", f"{here}watch.js"):
            assert asked(server, path)[0] == 200
        nowhere = ["/cells/", "/cells/later/", "/cells/a%20stranger/", "/cells/../", "/cells/..%2f..%2f/", f"{here}manifest.json"]
        for path in (*nowhere, "/sweep.html", f"{here}report.html", "/status.json"):
            assert asked(server, path)[0] == 404, path
        (run / "report.html").write_text("<p>the report")
        (sweep / "sweep.html").write_text("<p>the table")
        assert asked(server, f"{here}report.html")[2] == "<p>the report"
        assert asked(server, "/sweep.html")[2] == "<p>the table"
        shutil.rmtree(sweep)
        assert asked(server, "/")[0] == 503


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    run = folder(tmp_path / "run")
    told(run)
    lines(run, 0)
    with serving(run, 0) as found:
        yield found


def asked(server: Server, path: str, method: str = "GET", host: str = "") -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(HOST, server.server_port, timeout=20)
    connection.request(method, path, headers={"Host": host or f"{HOST}:{server.server_port}"})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def test_the_server_answers_about_one_run_and_nothing_else(server: Server) -> None:
    status, headers, page = asked(server, "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "75.0" in page
    assert asked(server, "/", "HEAD")[2] == ""
    assert asked(server, "/?x=1")[0] == 200
    assert "fetch(location.href" in asked(server, "/watch.js")[2]
    for path in ("/report.html", "/scenario.yaml", "/../run/manifest.json", "/%2e%2e/etc/passwd", "//etc/passwd", "/batches.jsonl"):
        assert asked(server, path)[0] == 404, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert asked(server, "/", method)[0] == 501
    assert asked(server, "/", host="evil.example")[0] == 403
    assert asked(server, "/", host=f"localhost:{server.server_port}")[0] == 200
    assert server.server_address[0] == HOST
    (server.watched.run / "report.html").write_text("<p>the report")
    assert asked(server, "/report.html")[2] == "<p>the report"


def test_the_server_follows_the_run_and_outlives_its_folder(server: Server) -> None:
    run = server.watched.run
    lines(run, 1, right=2)
    assert "62.5" in asked(server, "/")[2]  # eam: (7 + 3) / 16
    shutil.rmtree(run)
    status, _, said = asked(server, "/")
    assert status == 503
    assert "cannot be read as a run" in said
    folder(run)
    assert asked(server, "/")[0] == 200


def test_a_port_in_use_is_one_clear_error(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--port: found {server.server_port}, which cannot be used \(.*\); expected a free port"):
        Server(Watched(tmp_path / "run"), server.server_port)
    with serving(tmp_path / "run", 0) as other:
        assert other.server_port != server.server_port


def test_a_real_run_can_be_watched_when_it_is_over(first: tuple[Path, str]) -> None:
    """Of its hospitals, its stream, and no image, path or account."""
    here, _ = first
    run = here / "runs" / "tiny-3"
    watched = Watched(run)
    page = watched.page()
    summary = front_door.read(run / "summary.json")
    assert watched.state() == "done"
    assert watched.done == summary["stream"]["batches"]
    for name, row in watched.rows.items():
        assert row.accuracy() == pytest.approx(summary["methods"][name]["accuracy"])
    assert "its expert was trained in this run" in page
    assert "the stream&#39;s true mix" in page
    for secret in ("data:image/png", str(here), "sha256"):
        assert secret not in page
    ended = front_door.fedmerge(here, "watch", "runs/none")
    assert ended.returncode == 2
    assert ended.stderr.startswith("fedmerge: runs/none: found nothing; expected the folder of a run or of a sweep")


def test_a_folder_of_another_program_or_version_is_told_and_a_browser_that_goes_away_is_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = folder(tmp_path / "run")
    for content in ("[]", "null", '"x"', "7", "{"):
        (run / "status.json").write_text(content)
        assert Watched(run).status == {}
    for content in ("[]", "null", '"x"', "7", "{", ""):
        (run / "manifest.json").write_text(content)
        with pytest.raises(FolderError, match=r"found what cannot be read as a run \(.+\); expected the folder of a run"):
            Watched(run)
    folder(run)
    with serving(run, 0) as server:
        told(run, stream={"batches": "many", "course": 7})
        status, _, said = asked(server, "/")
        assert (status, said.count("cannot be read as a run")) == (503, 1)
        told(run)
        with socket.create_connection((HOST, server.server_port)) as gone:
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # as when a tab is closed
            gone.sendall(f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        assert asked(server, "/")[0] == 200
    assert "Traceback" not in capfd.readouterr().err
