"""Serve a run's page on this machine only, and render it again when its files change."""

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tsqlora.errors import DataError, SettingsError
from tsqlora.reports.comparison import is_comparison
from tsqlora.reports.page import PLOTLY_PATH, plotly_script, render
from tsqlora.training.record import RECORD_FILE
from tsqlora.training.run_dir import CONFIG_FILE, SCORES_FILE

HOST = "127.0.0.1"
"""Only this machine: the page contains texts of the training rows."""


def serve(run: Path, *, port: int = 0, control: Path | None = None, say: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C, and report its address through `say`.

    The run may not have started yet.  Raises SettingsError if plotly is missing, the port is taken or the directory
    is a comparison, DataError if `control` is no finished run.
    """
    if is_comparison(run):
        raise SettingsError(f"{run} is a comparison, which --watch cannot follow; leave out --watch")
    with make_server(Watched(run, control), port) as server:
        say(f"http://{HOST}:{server.server_address[1]}/")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


class Watched:
    """A run's directory, and the page of its current files."""

    def __init__(self, run: Path, control: Path | None = None) -> None:
        self.run, self.plotly = run, plotly_script().encode()
        # This imports plotly; the line above has a better message than an ImportError.
        from tsqlora.reports.gather import control_of, read_scores

        self.control = None if control is None else control_of(control)
        self.page_of = lru_cache(maxsize=1)(self._page_of)
        # Reading a million scores takes seconds, and a run writes them once or twice.
        self.scores_of = lru_cache(maxsize=1)(lambda path, stamp: read_scores(path))

    def page(self) -> bytes:
        """The page; if the run has not started or cannot be read, a page with the reason."""
        return self.page_of(tuple(_stamp(self.run / name) for name in (RECORD_FILE, CONFIG_FILE, SCORES_FILE)))

    def _page_of(self, stamps: object) -> bytes:
        from tsqlora.reports.gather import gather
        from tsqlora.reports.run_page import run_page

        try:
            run = gather(self.run, control=self.control, read=lambda path: self.scores_of(path, _stamp(path)))
        except DataError as error:
            started = (self.run / RECORD_FILE).exists()
            why = f"{self.run} has no run yet. The page appears with the first training step."
            name = self.run.resolve().name
            return render("waiting.html", script=None, name=name, why=str(error) if started else why).encode()
        return run_page(run, None).encode()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def make_server(watched: Watched, port: int) -> ThreadingHTTPServer:
    """A server on 127.0.0.1.  Raises SettingsError if the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # DNS rebinding: another site's name that resolves to this address is refused.
            names = {f"{name}:{self.server.server_address[1]}" for name in (HOST, "localhost")}  # type: ignore[index]
            if self.headers.get("Host") not in names:
                self.send_error(403)
            elif self.path == "/":
                self.give(watched.page(), "text/html; charset=utf-8")
            elif self.path == PLOTLY_PATH:
                self.give(watched.plotly, "text/javascript; charset=utf-8")
            else:
                self.send_error(404)

        def give(self, body: bytes, kind: str) -> None:
            tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            unchanged = self.headers.get("If-None-Match") == tag
            self.send_response(304 if unchanged else 200)
            for name, value in (
                ("ETag", tag),
                ("Cache-Control", "no-cache"),
                ("Cross-Origin-Resource-Policy", "same-origin"),
                ("X-Content-Type-Options", "nosniff"),
                ("Content-Type", kind),
                ("Content-Length", "0" if unchanged else str(len(body))),
            ):
                self.send_header(name, value)
            self.end_headers()
            if not unchanged:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: the terminal shows only the address."""

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise SettingsError(f"--port {port} cannot be used ({error}); use another, or 0 for any") from None
    server.daemon_threads = True
    return server
