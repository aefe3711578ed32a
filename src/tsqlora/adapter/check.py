"""Ask a running server with OpenAI's routes, and compare its answers with what PEFT writes."""

import ipaddress
import json
import os
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from socket import SHUT_RDWR
from typing import Any
from urllib.parse import urlsplit

from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.libs.hub import http_library

KEY = "TSQLORA_SERVER_KEY"
"""Environment variable of the key that is sent as the bearer token."""
CONNECT_SECONDS = 5.0
TOTAL_SECONDS = 600.0
"""Time for all answers together."""
MOST_BYTES = 1_000_000
"""Bytes of an answer."""
_SHOWN = 200
FIRST = 16
"""Tokens of an answer that must be the same."""
LEAST_SAME = 0.9
"""Share of answers that must be the same: rounding turns some that hardly prefer one token to another."""


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

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise SettingsError(
                f"--server-url {self.url}: give http://HOST:PORT or https://HOST, without a user or key"
            )
        self.url = self.url.rstrip("/").removesuffix("/v1")

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def is_loopback(self) -> bool:
        with suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that a path answers: GET, or POST of a body; no redirect, no proxy to this machine.

        Raises AnswerError for an error status, TsqLoraError if there is no answer, or none in time or of this size.
        """
        http, sockets, started, text = http_library(), list[Any](), time.monotonic(), b""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"

        def trace(event: str, info: Mapping[str, Any]) -> None:
            if event.endswith(("connect_tcp.complete", "start_tls.complete")):
                sockets.append(info["return_value"].get_extra_info("socket"))

        def cut_off() -> None:  # a socket's timeout begins again with every byte
            for each in sockets:
                with suppress(OSError):
                    each.shutdown(SHUT_RDWR)

        left = max(self.left, 0.001)
        timer = threading.Timer(left, cut_off)
        timer.daemon = True
        timer.start()
        try:
            how: dict[str, Any] = {"headers": headers, "extensions": {"trace": trace}}
            how["content"] = None if body is None else json.dumps(body).encode()
            limit = http.Timeout(left, connect=min(CONNECT_SECONDS, left))
            client = http.Client(timeout=limit, trust_env=not self.is_loopback, verify=ssl.create_default_context())
            with client, client.stream("GET" if body is None else "POST", self.url + path, **how) as answer:
                status = None if answer.is_success else answer.status_code
                with suppress(*(() if status is None else (http.HTTPError,))):  # an error may have no whole body
                    for part in answer.iter_raw():
                        text += part
                        if len(text) > (MOST_BYTES if status is None else _SHOWN):
                            break
            if status is None and time.monotonic() - started > self.left:  # what was read may be a part
                raise TimeoutError
        except (http.HTTPError, http.InvalidURL, OSError, ValueError, ImportError) as error:
            in_time = time.monotonic() - started < self.left
            why = f"{error}" if in_time else f"no whole answer within {TOTAL_SECONDS:g} seconds in all"
            raise TsqLoraError(f"{self.url} does not answer ({why})") from None
        finally:
            timer.cancel()
            self.left -= time.monotonic() - started
        if status is not None:
            shown = text.decode(errors="replace")[:_SHOWN]
            raise AnswerError(f"{self.url}{path} answered {status}: {shown}", status)
        if len(text) > MOST_BYTES:
            raise TsqLoraError(f"{self.url}{path} answered more than {MOST_BYTES:,} bytes")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise TsqLoraError(f"{self.url}{path} answered no JSON") from None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row's prompt as training renders it; `chat` is what a server's own template renders."""

    text: str
    ids: list[int]
    chat: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A text, and whether it stopped by itself."""

    text: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class Served:
    """A model on a server, at temperature 0; `most` is the number of tokens that an answer may have."""

    server: Server
    name: str
    most: int

    def answer(self, prompt: Prompt, *, ids: bool = False) -> Answer:
        """The answer to the messages; with `ids`, or without a template, to the prompt's tokens."""
        how = {"model": self.name, "max_tokens": self.most, "temperature": 0, "seed": 0}
        if prompt.chat is not None and not ids:
            return self._answer("/v1/chat/completions", {**how, **prompt.chat})
        try:
            return self._answer("/v1/completions", {**how, "prompt": prompt.ids})
        except AnswerError as error:
            if error.status not in (400, 415, 422):
                raise
            return self._answer("/v1/completions", {**how, "prompt": prompt.text})

    def _answer(self, path: str, body: Mapping[str, Any]) -> Answer:
        try:
            choice = self.server.ask(path, body)["choices"][0]
            text = choice["message"]["content"] if "chat" in path else choice["text"]
            return Answer(str(text or ""), choice["finish_reason"] == "stop")
        except (KeyError, IndexError, TypeError):
            raise TsqLoraError(f"{self.server.url}{path} does not answer in OpenAI's format") from None

    def tokens_of(self, chat: Mapping[str, Any]) -> list[int] | None:
        """The tokens of a chat by llama-server's routes, else by vLLM's; None if it does not say."""
        ask = self.server.ask
        try:
            try:
                text = ask("/apply-template", chat)["prompt"]
                answer = ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})
            except AnswerError:
                answer = ask("/tokenize", {"model": self.name, "add_generation_prompt": True, **chat})
            return [int(token) for token in answer["tokens"]]
        except (AnswerError, KeyError, TypeError, ValueError):
            return None


def name_on(server: Server, name: str | None) -> str:
    """The model's name on a server: the only one, or `name`.  Raises SettingsError if there are several, or others."""
    try:
        names = [str(model["id"]) for model in server.ask("/v1/models")["data"]]
    except (KeyError, TypeError):
        raise TsqLoraError(f"{server.url}/v1/models lists no models in OpenAI's format") from None
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        needed = "--served-name is needed" if name is None else f"--served-name {name} is not on the server"
        raise SettingsError(f"{needed}: {server.url} serves {', '.join(names)}")
    return name


def compare_answers(
    served: Served, prompts: Sequence[Prompt], write: Callable[..., Answer], tokenizer: Any
) -> dict[str, Any]:
    """Compare a server's answers with those that PEFT writes; a report for JSON.

    Where an answer differs, the server gets the prompt's tokens, which shows whether its template or its weights
    differ, and the base alone answers too.

    Args:
        write: PEFT's answer to a prompt; with base=True the first tokens of the base without the adapter.
    """

    def first(answer: Answer) -> list[int]:
        return tokenizer(answer.text.strip(), add_special_tokens=False, verbose=False)["input_ids"][:FIRST]

    answers = [served.answer(prompt) for prompt in prompts]
    expected = [write(prompt) for prompt in prompts]
    differ = [j for j, (answer, peft) in enumerate(zip(answers, expected, strict=True)) if first(answer) != first(peft)]
    by_base = [j for j in differ if first(write(prompts[j], base=True)) == first(answers[j])]
    by_template = [
        j
        for j in differ
        if prompts[j].chat is not None and first(served.answer(prompts[j], ids=True)) == first(expected[j])
    ]
    same = 1 - len(differ) / len(prompts)
    stopped, peft = (sum(answer.stopped for answer in each) / len(prompts) for each in (answers, expected))
    base_answered = len(by_base) > len(differ) / 2
    right = same >= LEAST_SAME and abs(stopped - peft) <= 1 - LEAST_SAME and not (base_answered and same < 1)
    example = differ[0] if differ else 0
    return {
        "server": served.server.url,
        "model": served.name,
        "prompts": len(prompts),
        "verdict": "right" if right else "wrong",
        "same": same,
        "stopped": stopped,
        "stopped_peft": peft,
        "base_answered": base_answered,
        "by_template": len(by_template),
        "by_weights": len(differ) - len(by_template),
        "prompt_tokens": _first_difference(served, prompts[example], tokenizer),
        "example": {"served": answers[example].text, "peft": expected[example].text} if differ else None,
    }


def _first_difference(served: Served, prompt: Prompt, tokenizer: Any) -> dict[str, Any] | None:
    """Where the server's tokens of a chat depart from training's; None if it does not say, or if there is no chat."""
    if prompt.chat is None or (theirs := served.tokens_of(prompt.chat)) is None:
        return None
    pairs = enumerate(zip(prompt.ids, theirs, strict=False))
    at = next((j for j, (own, other) in pairs if own != other), min(len(prompt.ids), len(theirs)))
    if at == len(prompt.ids) == len(theirs):
        return {"same": len(prompt.ids)}
    trained, other = (tokenizer.decode(ids[at : at + 4]) for ids in (prompt.ids, theirs))
    return {"at": at, "trained": trained, "served": other}
