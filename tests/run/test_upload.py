"""What is uploaded to the hub, to a stand-in for its API on this machine, and what is told where that fails."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from loras import lora_config, save_lora, tiny_llama
from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.run.export import export
from tsqlora.run.upload import push, require_repository

TOKEN = "hf_thisIsNoToken"


class Hub:
    """What a hub was asked, and what it answers."""

    def __init__(self) -> None:
        self.status, self.url = 200, ""
        self.calls: list[str] = []
        self.tokens: set[str | None] = set()
        self.created: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        self.calls.append(path)
        if path == "/api/repos/create":
            self.created = json.loads(body)
            name = self.created["name"]
            return {"url": f"{self.url}/me/{name}", "name": f"me/{name}"}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitUrl": f"{self.url}/me/adapter/commit/abc", "commitOid": "abc", "success": True}
        return {"warnings": [], "errors": []}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on a port of this machine, to which huggingface_hub speaks within the test."""
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_POST(self) -> None:
            chunked = self.headers.get("Transfer-Encoding") == "chunked"
            body = self.chunks() if chunked else self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found.tokens.add(self.headers.get("Authorization"))
            said = json.dumps(found.answer(self.path.partition("?")[0], body)).encode()
            self.send_response(found.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def chunks(self) -> bytes:
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found
        server.shutdown()


def test_an_export_is_uploaded_whole_and_new_repositories_are_private(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_lora(tmp_path / "a", tiny_llama(), lora_config())
    report = export(tmp_path / "a", tmp_path / "out", format="peft", push_to_hub="me/adapter")
    assert report["pushed"].endswith("/me/adapter/commit/abc")
    assert hub.created["visibility"] == "private"
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.tokens == {f"Bearer {TOKEN}"}, "huggingface_hub found it"
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in written)
    assert TOKEN not in json.dumps(report) + "".join(capsys.readouterr())


def test_a_name_without_an_owner_is_the_users_own(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    push(tmp_path, "adapter")
    assert hub.files
    assert {path for path in hub.calls if path.endswith("/main")} == {
        "/api/models/me/adapter/preupload/main",
        "/api/models/me/adapter/commit/main",
    }


def test_a_hub_that_cannot_be_reached_leaves_it_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(TsqLoraError, match=r"was not pushed to me/adapter \(ConnectError: .*refused\); log in"):
        push(tmp_path, "me/adapter")


def test_a_hub_that_refuses_leaves_the_export_and_says_how_to_go_on(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    hub.status = 403
    with pytest.raises(
        TsqLoraError, match=r"was not pushed to me/adapter \(the hub answers 403\); log in with"
    ) as told:
        push(tmp_path / "out", "me/adapter")
    assert TOKEN not in str(told.value)
    assert f"hf upload me/adapter {tmp_path / 'out'}" in str(told.value)


def test_without_a_network_the_same(tmp_path: Path) -> None:
    # Tests run with HF_HUB_OFFLINE.
    with pytest.raises(TsqLoraError, match=r"was not pushed to me/adapter \(HF_HUB_OFFLINE is set\)"):
        push(tmp_path, "me/adapter")


def test_what_is_no_repository_is_told_before_anything_is_written(tmp_path: Path) -> None:
    save_lora(tmp_path / "a", tiny_llama(), lora_config())
    with pytest.raises(SettingsError, match="--push-to-hub a/b/c: "):
        export(tmp_path / "a", tmp_path / "out", format="peft", push_to_hub="a/b/c")
    assert not (tmp_path / "out").exists()
    require_repository("me/adapter")
