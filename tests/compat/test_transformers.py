"""The contract with transformers: a failure here says which of its interfaces has changed."""

import json
from pathlib import Path

from transformers import TrainerState
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from tsqlora.compat.transformers import saved_note, set_deletion_order


def test_the_trainer_deletes_checkpoints_in_the_order_that_was_set(tmp_path: Path) -> None:
    """`rotate_checkpoints` goes by dates that span a second; numbers would delete checkpoint-1, the newest."""
    order = [tmp_path / "checkpoint-20.earlier", tmp_path / "checkpoint-1"]
    for path in order:
        path.mkdir()
    set_deletion_order(order)
    assert sort_checkpoints(str(tmp_path), use_mtime=True) == [str(path) for path in order]
    new = tmp_path / "checkpoint-2"
    new.mkdir()
    rotate_checkpoints(str(tmp_path), save_total_limit=1, use_mtime=True)
    assert list(tmp_path.iterdir()) == [new]


def test_a_note_in_the_state_is_in_every_checkpoint(tmp_path: Path) -> None:
    state = TrainerState()
    saved_note(state, "tsqlora")["run"] = "a"
    state.save_to_json(str(tmp_path / "state.json"))
    assert json.loads((tmp_path / "state.json").read_text())["stateful_callbacks"]["tsqlora"] == {"run": "a"}
    assert saved_note(TrainerState.load_from_json(str(tmp_path / "state.json")), "tsqlora") == {"run": "a"}
