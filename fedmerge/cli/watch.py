"""`fedmerge watch`: the page of a running run, or of a sweep and each of its runs, on this machine alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fedmerge.errors import FolderError, UserError
from fedmerge.report.pages.watch import EXPECTED, Watched, script
from fedmerge.report.pages.watch_sweep import CELLS, WatchedSweep, is_sweep
from fedmerge.system.files import reading

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")

HTML = "text/html; charset=utf-8"
REPORT = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
ITSELF = f"{REPORT}; script-src 'self'; connect-src 'self'"
"""What a browser lets the pages do: nothing is asked of another machine, and the report runs no code."""

Answered = tuple[HTTPStatus, str, bytes, str]
"""Status, type, content, and what a browser lets it do."""

TEXT = "text/plain; charset=utf-8"
NOTHING: Answered = HTTPStatus.NOT_FOUND, TEXT, b"nothing is here; the page is at /\n", REPORT


class Server(ThreadingHTTPServer):
    """Answers about a run, or a sweep and its runs. Raises UserError if the port cannot be used. port: 0 for any that is free."""

    daemon_threads = True

    def __init__(self, watched: Watched | WatchedSweep, port: int) -> None:
        self.watched = watched
        self.one_at_a_time = threading.Lock()
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            mend = "choose another, or --port 0 for any that is free"
            raise UserError(
                f"--port: found {port}, which cannot be used ({error.strerror}); expected a free port of this machine: {mend}"
            ) from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away before it has its answer is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def answer(self, path: str) -> Answered:
        """What is at a path: the page, its script, and the report as soon as it is written; of a sweep, also those of its runs."""
        try:
            with self.one_at_a_time, reading(self.watched.run, "what cannot be read as a run", EXPECTED):
                return self._answer(path)
        except FolderError as error:  # the folder was removed, or is being written by something else
            return HTTPStatus.SERVICE_UNAVAILABLE, TEXT, f"{error}\n".encode(), REPORT

    def _answer(self, path: str) -> Answered:
        watched, sweep = self.watched, ""
        if isinstance(watched, WatchedSweep) and path.startswith(f"/{CELLS}/"):
            name, _, rest = path.removeprefix(f"/{CELLS}/").partition("/")
            watched.look()
            if (run := watched.of(unquote(name))) is None:
                return NOTHING
            watched, path, sweep = run, f"/{rest}", "../../"
        if path == "/":
            watched.look()
            page = watched.page(sweep) if isinstance(watched, Watched) else watched.page()
            return HTTPStatus.OK, HTML, page.encode(), ITSELF
        if path == "/watch.js":
            return HTTPStatus.OK, "text/javascript; charset=utf-8", script(), ITSELF
        if path == f"/{watched.result.name}" and watched.result.is_file():
            return HTTPStatus.OK, HTML, watched.result.read_bytes(), REPORT
        return NOTHING


class Handler(BaseHTTPRequestHandler):
    """One request. Only what a browser on this machine asks of this machine is answered, and nothing can be changed."""

    server: Server
    server_version = "fedmerge"
    sys_version = ""
    timeout = 10

    def do_GET(self) -> None:
        """Answer with content."""
        self._answer(True)

    def do_HEAD(self) -> None:
        """Answer without."""
        self._answer(False)

    def _answer(self, whole: bool) -> None:
        # A page of another site may have its own name lead to this machine; it then asks under that name.
        if self.headers.get("Host", "").partition(":")[0] not in NAMES:
            asked: Answered = HTTPStatus.FORBIDDEN, TEXT, b"ask for 127.0.0.1 or localhost\n", REPORT
        else:
            asked = self.server.answer(self.path.partition("?")[0])
        status, kind, content, policy = asked
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if whole:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """A request every two seconds is no news."""


@contextmanager
def serving(run: Path, port: int) -> Iterator[Server]:
    """A server of the page of a run or a sweep, which answers in a thread of its own. Raises FolderError or UserError."""
    with Server(WatchedSweep(run) if is_sweep(run) else Watched(run), port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
