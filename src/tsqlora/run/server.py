"""A running server with OpenAI's routes, asked by the standard library's urllib: no redirect, no endless answer."""

import ipaddress
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from socket import SHUT_RDWR, socket
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    build_opener,
)

from tsqlora.errors import SettingsError, TsqLoraError

KEY = "TSQLORA_SERVER_KEY"
"""Environment variable of the key that is sent as the bearer token."""
CONNECT_SECONDS = 5.0
TOTAL_SECONDS = 600.0
"""Time for all answers together."""
MOST_BYTES = 1_000_000
"""Bytes of an answer."""
_SHOWN = 200


class AnswerError(TsqLoraError):
    """The server answered with an error status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Server:
    """A server at a URL.  Raises SettingsError for a URL that is not http(s)://HOST[:PORT][/PATH].

    Attributes:
        left: seconds left for its answers.
    """

    url: str
    left: float = TOTAL_SECONDS
    _open: OpenerDirector = field(init=False, repr=False)
    _sockets: list[socket] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise SettingsError(
                f"--server-url {self.url}: give http://HOST:PORT or https://HOST, without a user or key"
            )
        self.url = self.url.rstrip("/").removesuffix("/v1")
        proxies = [ProxyHandler({})] if self.is_loopback else []
        self._open = build_opener(*proxies, _NoRedirect, _Plain(self._sockets), _Secure(self._sockets))

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def is_loopback(self) -> bool:
        with suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that a path answers: GET, or POST of a body.

        Raises AnswerError for an error status, TsqLoraError if there is no answer, or none in time or of this size.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request, started = Request(self.url + path, data, headers), time.monotonic()
        try:
            with self._cut_off(), self._open.open(request, timeout=max(self.left, 0.001)) as answer:
                text = answer.read(MOST_BYTES + 1)
            if time.monotonic() - started > self.left:  # what was read may be a part
                raise TimeoutError
        except HTTPError as error:
            text = ""
            with error, suppress(OSError, HTTPException):
                text = error.read(_SHOWN).decode(errors="replace")
            raise AnswerError(f"{self.url}{path} answered {error.code}: {text:.{_SHOWN}}", error.code) from None
        except (OSError, HTTPException, ValueError) as error:
            reason = error.reason if isinstance(error, URLError) else error
            in_time = time.monotonic() - started < self.left
            why = f"{reason}" if in_time else f"no whole answer within {TOTAL_SECONDS:g} seconds in all"
            raise TsqLoraError(f"{self.url} does not answer ({why})") from None
        finally:
            self.left -= time.monotonic() - started
        if len(text) > MOST_BYTES:
            raise TsqLoraError(f"{self.url}{path} answered more than {MOST_BYTES:,} bytes")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise TsqLoraError(f"{self.url}{path} answered no JSON") from None

    @contextmanager
    def _cut_off(self) -> Iterator[None]:
        """Close the connection when the time is up: a socket's timeout begins again with every byte."""
        timer = threading.Timer(max(self.left, 0.001), self._close)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._sockets.clear()

    def _close(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(SHUT_RDWR)


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _connecting(kind: type[HTTPConnection], opened: list[socket]) -> Callable[..., HTTPConnection]:
    """A connection that has less time to connect than to answer."""

    class Connection(kind):
        def connect(self) -> None:
            whole, self.timeout = self.timeout, min(CONNECT_SECONDS, self.timeout or CONNECT_SECONDS)
            super().connect()
            self.sock.settimeout(whole)
            opened.append(self.sock)  # the connection lets go of it while an answer is read

    return Connection


class _Plain(HTTPHandler):
    def __init__(self, opened: list[socket]) -> None:
        super().__init__()
        self.opened = opened

    def http_open(self, req: Request) -> Any:
        return self.do_open(_connecting(HTTPConnection, self.opened), req)


class _Secure(HTTPSHandler):
    def __init__(self, opened: list[socket]) -> None:
        super().__init__()
        self.opened = opened

    def https_open(self, req: Request) -> Any:
        return self.do_open(_connecting(HTTPSConnection, self.opened), req)
