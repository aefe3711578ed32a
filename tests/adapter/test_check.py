"""Asking a server: what is never sent, followed or waited for.  All servers are on 127.0.0.1."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tsqlora.adapter import check as module
from tsqlora.adapter.check import KEY, AnswerError, Server
from tsqlora.errors import SettingsError, TsqLoraError

Answer = Callable[[BaseHTTPRequestHandler, Any], None]


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """A server on a free port of 127.0.0.1, which hands each request and its JSON to `answer`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self, None)

        def do_POST(self) -> None:
            answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def say(handler: BaseHTTPRequestHandler, value: Any, status: int = 200) -> None:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://h", "127.0.0.1:8000", "http://", "http://me:key@h", "http://h?key=1"]
)
def test_only_plain_web_addresses_are_taken(url: str) -> None:
    with pytest.raises(SettingsError):
        Server(url)


def test_loopback_is_a_matter_of_the_address() -> None:
    assert all(Server(url).is_loopback for url in ("http://127.0.0.1:1", "http://[::1]:1", "http://localhost/v1/"))
    assert not any(Server(url).is_loopback for url in ("http://10.0.0.1", "https://localhost.example"))


def test_v1_may_be_part_of_the_url_and_json_is_answered() -> None:
    with serving(lambda handler, body: say(handler, {"path": handler.path, "got": body})) as url:
        assert Server(f"{url}/v1/").ask("/v1/x", {"a": 1}) == {"path": "/v1/x", "got": {"a": 1}}
        assert Server(url).ask("/v1/models") == {"path": "/v1/models", "got": None}


def test_a_key_comes_from_the_environment_and_no_proxy_sees_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(lambda handler, _: say(handler, handler.headers.get("Authorization"))) as url:
        assert Server(url).ask("/") is None
        monkeypatch.setenv(KEY, "secret")
        assert Server(url).ask("/") == "Bearer secret"


def test_no_redirect_is_followed() -> None:
    paths = list[str]()

    def away(handler: BaseHTTPRequestHandler, _: Any) -> None:
        paths.append(handler.path)
        handler.send_response(302)
        handler.send_header("Location", "/elsewhere")
        handler.end_headers()

    with serving(away) as url, pytest.raises(AnswerError) as raised:
        Server(url).ask("/here")
    assert (paths, raised.value.status) == (["/here"], 302)


@pytest.mark.parametrize(
    ("answer", "status", "named"),
    [({"error": "no such model" + "!" * 9999}, 404, "404.*no such model"), (b"<html>", 200, "no JSON")],
)
def test_an_error_is_a_short_line(answer: Any, status: int, named: str) -> None:
    with (
        serving(lambda handler, _: say(handler, answer, status)) as url,
        pytest.raises(TsqLoraError, match=named) as raised,
    ):
        Server(url).ask("/x")
    assert len(str(raised.value)) < 400


def test_a_server_that_is_not_there_is_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(TsqLoraError, match="does not answer") as raised:
        Server(f"http://127.0.0.1:{port}").ask("/v1/models")
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 1


def test_an_answer_may_have_a_megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    with serving(lambda handler, _: say(handler, "x" * 998)) as url:
        assert len(Server(url).ask("/")) == 998
    with serving(lambda handler, _: say(handler, "x" * 999)) as url, pytest.raises(TsqLoraError, match="1,000 bytes"):
        Server(url).ask("/")


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_byte_at_a_time_does_not_hold_it_up(part: str) -> None:
    def drip(handler: BaseHTTPRequestHandler, _: Any) -> None:
        if part == "body":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
        for _ in range(200):
            try:
                handler.wfile.write(b"x")
                handler.wfile.flush()
            except OSError:
                return
            time.sleep(0.05)

    with serving(drip) as url:
        server, started = Server(url, left=0.3), time.monotonic()
        with pytest.raises(TsqLoraError, match="seconds in all"):
            server.ask("/")
        assert time.monotonic() - started < 3
        assert server.left < 0
