"""Every page that fedmerge writes or serves, in a real browser: with axe, on a phone, on dark paper, and no request elsewhere.

Needs Chromium (FEDMERGE_CHROMIUM, or one on the PATH) and `pip install --group browser`; skipped without. `make browser` runs it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from filelock import FileLock

from fedmerge.cli.watch import serving
from fedmerge.report.pages.sweep import write_grid
from fedmerge.report.sweep_table import Grid
from fedmerge.system.process import free_lock
from tests import front_door

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = [
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-dev-shm-usage"),
]
PHONE, DESK = 375, 1280
HELD: list[FileLock] = []
"""Locks of what seems to be going on, until this process ends."""
PAGES = ("report", "diagnose", "sweep", "compare", "watch", "watch sweep")


def program() -> str:
    """Where Chromium is; skips the test where there is none."""
    found = os.environ.get("FEDMERGE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is on the PATH, and FEDMERGE_CHROMIUM is not set")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install --group browser")
    path = program()
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which root cannot have
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=[*QUIET, *sandbox])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def here(browser: Any, first: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run that many tests share, as soon as there is a browser."""
    return Path(shutil.copytree(first[0], tmp_path_factory.mktemp("pages") / "here"))


@pytest.fixture(scope="module")
def pages(here: Path) -> Iterator[dict[str, str]]:
    """Addresses of one page of each kind, of a tiny run whose target shows some images."""
    mercy = here / "sites" / "mercy.yaml"
    mercy.write_text(mercy.read_text() + "disagreements: 4\n")
    shutil.rmtree(here / "runs")
    run = here / "runs" / "tiny-3"
    for words in (
        ("simulate", "scenarios/tiny.yaml", "--quiet"),
        ("diagnose", "runs/tiny-3", "--images", "16", "--quiet"),
        ("simulate", "scenarios/tiny.yaml", "--out", "runs/other", "--set", "methods.eam.gamma=1", "--quiet"),
        ("compare", "runs/tiny-3", "runs/other", "--html", "runs/compare.html"),
    ):
        ended = front_door.fedmerge(here, *words)
        assert ended.returncode == 0, ended.stderr
    cells = [(gamma, front_door.read(folder / "summary.json")) for gamma, folder in ((5, run), (1, here / "runs" / "other"))]
    rows = [{"seed": 3, "target": None, "settings": {"gamma": gamma}, "methods": cell["methods"]} for gamma, cell in cells]
    write_grid(here / "runs" / "sweep", Grid.of(rows), "tiny")
    going_on(run, here / "runs" / "sweep")
    files = {"report": run / "report.html", "diagnose": run / "diagnose.html"}
    files |= {"sweep": here / "runs" / "sweep" / "sweep.html", "compare": here / "runs" / "compare.html"}
    with serving(run, 0) as server, serving(here / "runs" / "sweep", 0) as of_sweep:
        yield {name: file.as_uri() for name, file in files.items()} | {"watch": server.url, "watch sweep": of_sweep.url}


def going_on(run: Path, sweep: Path) -> None:
    """A sweep that has done one run, is in another, and will do a third."""
    names = ["gamma=1-seed3", "gamma=5-seed3", "gamma=9-seed3"]
    for name in names[:2]:
        shutil.copytree(run, sweep / "cells" / name)
    manifest = sweep / "cells" / names[1] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"status": "done"', '"status": "running"'))
    told = {"state": "running", "sweep": "tiny", "began": 0, "since": 0, "phase": "streams, 1 at a time"}
    (sweep / "status.json").write_text(json.dumps({**told, "cells": names, "left": names}))
    HELD.extend(filter(None, (free_lock(folder / ".lock") for folder in (sweep, manifest.parent))))


class Opened:
    """A page as a reader has it: how wide the paper is, and whether it is dark."""

    def __init__(self, browser: Any, address: str, width: int, paper: str) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=paper)
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_load_state("load")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("paper", ["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read_by_everybody(browser: Any, pages: dict[str, str], name: str, width: int, paper: str) -> None:
    """No finding of axe with all lists open; no wider than its paper; nothing asked of another machine; no error of its code."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed: pip install --group browser")
    with Opened(browser, pages[name], width, paper) as opened:
        opened.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        found = axe.Axe().run(opened.page).response["violations"]
        assert [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found] == []
        assert {urlsplit(url).scheme or url for url in opened.asked} <= {"file", "data", "http"}
        assert {urlsplit(url).hostname for url in opened.asked if url.startswith("http")} <= {"127.0.0.1"}
        assert opened.said == []


@pytest.mark.long
def test_the_documentation_can_be_read_by_everybody(browser: Any, tmp_path: Path) -> None:
    """Every page, wide on light paper and on a phone in the dark: no finding of axe, and no wider than its paper."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed: pip install --group browser")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).resolve().parents[2], check=True, capture_output=True)
    found = {}
    for width, paper in ((DESK, "light"), (PHONE, "dark")):
        with Opened(browser, (tmp_path / "index.html").as_uri(), width, paper) as opened:
            for page in sorted(page for page in tmp_path.rglob("*.html") if page.name != "404.html"):  # which a server alone shows
                opened.page.goto(page.as_uri())
                violations = axe.Axe().run(opened.page).response["violations"]
                findings = [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in violations]
                wide = opened.page.evaluate("document.documentElement.scrollWidth") > width
                if findings or wide:
                    found[f"{page.relative_to(tmp_path)}, {width} px, {paper}"] = [*findings, *["too wide"] * wide]
    assert found == {}


@pytest.mark.parametrize("name", PAGES)
def test_the_keyboard_reaches_all_that_scrolls(browser: Any, pages: dict[str, str], name: str) -> None:
    with Opened(browser, pages[name], PHONE, "light") as opened:
        unreachable = """() => [...document.querySelectorAll('*')].filter(one =>
            one.scrollWidth > one.clientWidth + 1 && ['auto', 'scroll'].includes(getComputedStyle(one).overflowX)
            && one.tabIndex < 0 && one.tagName !== 'PRE').map(one => one.outerHTML.slice(0, 120))"""
        assert opened.page.evaluate(unreachable) == []
        opened.page.keyboard.press("Tab")
        ring = opened.page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)")
        assert ring >= 2


@pytest.mark.parametrize("name", ["report", "diagnose", "sweep"])
def test_plots_follow_the_paper(browser: Any, pages: dict[str, str], name: str) -> None:
    """Letters of a plot are light on dark paper, and no plot brings white paper of its own."""
    mean = """async () => { const shown = document.querySelector('img.plot'); await shown.decode();
        const canvas = document.createElement('canvas'); canvas.width = 400; canvas.height = 200;
        const brush = canvas.getContext('2d'); brush.drawImage(shown, 0, 0, 400, 200);
        const pixels = brush.getImageData(0, 0, 400, 200).data; let light = 0, seen = 0;
        for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] > 128) {
            seen += 1; light += pixels[i] + pixels[i + 1] + pixels[i + 2]; }
        return [seen / (400 * 200), light / (3 * Math.max(1, seen))]; }"""
    found = {}
    for paper in ("light", "dark"):
        with Opened(browser, pages[name], DESK, paper) as opened:
            found[paper] = opened.page.evaluate(mean)
    assert all(share < 0.9 for share, _ in found.values())
    assert found["dark"][1] > found["light"][1]


def test_nothing_is_cut_off_in_print(browser: Any, pages: dict[str, str]) -> None:
    """On A4 with margins of 14 mm, a page is 688 px wide."""
    with Opened(browser, pages["report"], 688, "dark") as opened:
        opened.page.emulate_media(media="print")
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 688
        assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        wide = """[...document.querySelectorAll('main .wide')].filter(one =>
            one.offsetParent && one.scrollWidth > one.clientWidth + 1).length"""
        assert opened.page.evaluate(wide) == 0
        assert opened.page.pdf(format="A4").startswith(b"%PDF")


def test_the_watch_page_follows_without_losing_its_reader(browser: Any, pages: dict[str, str], here: Path) -> None:
    """What changes in the folder comes to the page by itself; focus and open lists stay."""
    run = here / "runs" / "tiny-3"
    with Opened(browser, pages["watch"], DESK, "light") as opened:
        opened.page.locator("nav summary").click()
        opened.page.locator("#hospitals + .wide").focus()
        manifest = (run / "manifest.json").read_text()
        try:
            (run / "manifest.json").write_text(manifest.replace('"status": "done"', '"status": "failed"'))
            opened.page.get_by_text("Failed").wait_for(timeout=30_000)
        finally:
            (run / "manifest.json").write_text(manifest)
        assert opened.page.locator("nav details").get_attribute("open") is not None
        assert opened.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Progress of every hospital"
        opened.page.get_by_role("link", name="Open the report").wait_for(timeout=30_000)
        opened.page.get_by_role("link", name="Open the report").click()
        opened.page.get_by_role("heading", name="Which method is right most often?").wait_for(timeout=30_000)
        assert opened.said == []


def started(here: Path, *words: str) -> subprocess.Popen[bytes]:
    """A command as a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "fedmerge", *words, "--quiet"], cwd=here, env=environment)


def wait_for(file: Path, pattern: str, process: subprocess.Popen[bytes]) -> None:
    while not list(file.glob(pattern)):
        assert process.poll() is None
        time.sleep(0.02)


@pytest.mark.long
def test_a_run_by_flower_and_ray_is_followed_when_it_is_killed_and_goes_on(browser: Any, here: Path) -> None:
    """As one page in one browser, which nobody loads again: hospitals, batches, the end of the process, and the rest."""
    run = here / "runs" / "live"
    words = ("simulate", "scenarios/tiny.yaml", "--backend", "simulation", "--out", "runs/live", "--pool", "runs/live-pool")
    words += ("--set", "stream.batch_size=1")
    process = started(here, *words)
    try:
        wait_for(run, "manifest.json", process)
        with serving(run, 0) as server, Opened(browser, server.url, DESK, "light") as opened:
            opened.page.get_by_text("Running: hospitals").wait_for(timeout=240_000)
            opened.page.get_by_text("Running: target").wait_for(timeout=240_000)
            opened.page.get_by_role("region", name="Accuracy of every method so far").wait_for(timeout=240_000)
            wait_for(run, "progress/*.npz", process)
            process.kill()
            process.wait()
            opened.page.get_by_text("Cut off").wait_for(timeout=60_000)
            process = started(here, *words, "--resume")
            opened.page.get_by_text("Running: target").wait_for(timeout=240_000)
            opened.page.get_by_role("link", name="Open the report").wait_for(timeout=240_000)
            assert process.wait() == 0
            opened.page.wait_for_timeout(5_000)
            summary = front_door.read(run / "summary.json")
            rows = opened.page.get_by_role("region", name="Accuracy of every method so far").get_by_role("row").all_inner_texts()
            assert len(rows) == 1 + len(summary["methods"])
            for name, row in summary["methods"].items():
                assert any(text.startswith(name) and f"{100 * row['accuracy']:.1f}" in text for text in rows), (name, rows)
            assert opened.said == []
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
def test_a_sweep_is_followed_from_its_first_run_to_its_table(browser: Any, here: Path) -> None:
    sweep = here / "runs" / "swept"
    gammas = ("--set", "methods.eam.gamma=1,5", "--set", "stream.batch_size=1")
    process = started(here, "sweep", "scenarios/tiny.yaml", *gammas, "--out", "runs/swept", "--jobs", "1")
    try:
        wait_for(sweep, "status.json", process)
        while not front_door.read(sweep / "status.json").get("cells"):
            time.sleep(0.02)
        with serving(sweep, 0) as server, Opened(browser, server.url, PHONE, "dark") as opened:
            opened.page.get_by_text("Running: streams, 1 at a time").wait_for(timeout=240_000)
            opened.page.get_by_text("1 of 2 runs are done").wait_for(timeout=240_000)
            opened.page.get_by_role("link", name="Open the table and the plots").wait_for(timeout=240_000)
            assert process.wait() == 0
            opened.page.get_by_text("2 of 2 runs are done").wait_for(timeout=20_000)
            opened.page.get_by_role("link", name="gamma=5").click()
            opened.page.get_by_role("link", name="Open the report").wait_for(timeout=20_000)
            opened.page.get_by_role("link", name="All runs of the sweep").click()
            opened.page.get_by_role("link", name="Open the table and the plots").click()
            opened.page.get_by_role("heading", name="Accuracy by setting").wait_for(timeout=20_000)
            assert opened.said == []
    finally:
        process.terminate()
        process.wait()
