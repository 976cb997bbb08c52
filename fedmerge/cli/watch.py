"""`fedmerge watch`: the page of a running run, on this machine alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fedmerge.errors import FolderError, UserError
from fedmerge.report.pages.watch import Watched, script

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")

HTML = "text/html; charset=utf-8"
REPORT = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
ITSELF = f"{REPORT}; script-src 'self'; connect-src 'self'"
"""What a browser lets the pages do: nothing is asked of another machine, and the report runs no code."""

Answered = tuple[HTTPStatus, str, bytes, str]
"""Status, type, content, and what a browser lets it do."""


class Server(ThreadingHTTPServer):
    """Answers about one run. Raises UserError if the port cannot be used. port: 0 for any that is free."""

    daemon_threads = True

    def __init__(self, watched: Watched, port: int) -> None:
        self.watched = watched
        self.one_at_a_time = threading.Lock()
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            mend = "choose another, or --port 0 for any that is free"
            raise UserError(
                f"--port: found {port}, which cannot be used ({error.strerror}); expected a free port of this machine: {mend}"
            ) from None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def answer(self, path: str) -> Answered:
        """What is at a path: the page, its script, and the report as soon as it is written."""
        report = self.watched.run / "report.html"
        if path == "/":
            return self._page()
        if path == "/watch.js":
            return HTTPStatus.OK, "text/javascript; charset=utf-8", script(), ITSELF
        if path == "/report.html" and report.is_file():
            return HTTPStatus.OK, HTML, report.read_bytes(), REPORT
        return HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"nothing is here; the page is at /\n", REPORT

    def _page(self) -> Answered:
        try:
            with self.one_at_a_time:
                self.watched.look()
                return HTTPStatus.OK, HTML, self.watched.page().encode(), ITSELF
        except FolderError as error:  # the folder was removed, or is being written by something else
            return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", f"{error}\n".encode(), REPORT


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
            asked: Answered = HTTPStatus.FORBIDDEN, "text/plain; charset=utf-8", b"ask for 127.0.0.1 or localhost\n", REPORT
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
    """A server of the run's page, which answers in a thread of its own. Raises FolderError or UserError."""
    with Server(Watched(run), port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
