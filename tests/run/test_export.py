"""An export is uploaded to the hub whole and in private; where that fails it stays, and the cure is named."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from loras import lora_config, save_lora, tiny_llama
from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.run import export as export_module
from tsqlora.run.export import export


class Hub:
    """What huggingface_hub was asked to do."""

    def __init__(self) -> None:
        self.created: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo: str, **options: Any) -> Any:
        self.created = options
        return SimpleNamespace(repo_id=repo if "/" in repo else f"me/{repo}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> Any:
        assert repo_id == "me/adapter"
        self.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return SimpleNamespace(commit_url="https://hub/me/adapter/commit/abc")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_lora(tmp_path / "a", tiny_llama(), lora_config())


@pytest.mark.parametrize("name", ["me/adapter", "adapter"])
def test_an_export_is_uploaded_whole_and_new_repositories_are_private(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr(export_module, "HfApi", lambda: hub)
    report = export(source, tmp_path / "out", format="peft", push_to_hub=name)
    assert report["pushed"].endswith("/me/adapter/commit/abc")
    assert hub.created == {"private": True, "exist_ok": True}
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_that_cannot_be_reached_leaves_the_export_and_the_cure(
    offline: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsNoToken")
    with pytest.raises(TsqLoraError, match=f"hf upload me/adapter {tmp_path / 'out'}") as refused:
        export(source, tmp_path / "out", format="peft", push_to_hub="me/adapter")
    assert "thisIsNoToken" not in str(refused.value)
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_what_is_no_repository_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--push-to-hub a/b/c"):
        export(source, tmp_path / "out", format="peft", push_to_hub="a/b/c")
    assert not (tmp_path / "out").exists()
