"""A headless Chromium by its own protocol, over pipes: pages are opened, clicked and measured."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str:
    """The program; the test that asks is skipped where there is none."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    pytest.skip(f"no browser is installed ({', '.join(NAMES)})")


class Page:
    """One tab. `messages` are the errors and warnings of its console, `requests` the addresses that it asked for."""

    def __init__(self, to: int, back: FileIO) -> None:
        self._to, self._back = to, back
        self._read, self._number, self._session = b"", 0, None
        self.messages: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer; what happened before the answer is kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            part = self._back.read(1 << 16)
            assert part, "the browser is gone"
            self._read += part
        line, _, self._read = self._read.partition(b"\0")
        event = json.loads(line)
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.messages.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.messages.append(json.dumps(params["args"]))
            case "Log.entryAdded":
                self.messages.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
        return event

    def open(self, place: Path | str, *, width: int, dark: bool = False) -> None:
        """Loads a file or an address in a window of this width, and waits until it is there."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url=place if isinstance(place, str) else place.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        actual = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in actual, actual
        return actual["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """One key, down and up."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


def axe() -> str:
    """axe-core's script, which `make test-all` installs by npm; the test that asks is skipped where there is none."""
    path = Path(sys.prefix) / "axe" / "node_modules" / "axe-core" / "axe.min.js"
    if not path.exists():
        pytest.skip(f"axe-core is not installed ({path}); make test-all does it where npm finds its registry")
    return path.read_text(encoding="utf-8")


@contextmanager
def browser() -> Iterator[Page]:
    """A browser of its own for the block, which ends with it."""
    program = find_browser()
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = [
            "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
            # A new frame for each load finds an empty local storage once in some hundred loads on a busy machine.
            "--disable-features=RenderDocument", f"--user-data-dir={profile}",
        ]  # fmt: skip
        # The protocol's pipes are file descriptors 3 and 4 of the browser. Not every sh supports more than 9.
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", program, *flags]
        with subprocess.Popen(
            shell, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            os.close(theirs_in)
            os.close(theirs_out)
            back = FileIO(ours_in)
            try:
                yield Page(ours_out, back)
            finally:
                process.terminate()
                process.wait(10)
                os.close(ours_out)
                back.close()
