"""Names for the hub are names, never paths."""

import pytest

from tsqlora.errors import SettingsError
from tsqlora.libs.hub import is_hub_id, is_revision
from tsqlora.model.load import load_pretrained
from tsqlora.tasks import get_task


@pytest.mark.parametrize(
    "name", ["bert-base-uncased", "org/model", "a/b-1.0_x", "gpt2", "sentence-transformers/all-MiniLM-L6-v2"]
)
def test_ids_of_the_hub(name: str) -> None:
    assert is_hub_id(name)


PATHS = ["", ".", "..", "/", "a/", "/a", "a//b", "../a", "a/..", "a/b/c", "~", "~/a", "a b", "a\n", "a\0", "C:\\a", "é"]


@pytest.mark.parametrize("name", [*PATHS, "x" * 97])
def test_what_looks_like_a_path_is_no_id(name: str) -> None:
    assert not is_hub_id(name)
    with pytest.raises(SettingsError, match="no such directory; correct it, or give a hub id"):
        load_pretrained(name if name not in (".", "..", "/") else f"{name}/nowhere", get_task("regression"))


@pytest.mark.parametrize("name", ["..", "a/../b", "/a", "a//b", ".", "", "a\\b", "a\nb"])
def test_a_revision_does_not_walk_about(name: str) -> None:
    assert not is_revision(name)
