"""The contract with transformers: a failure here says which of its interfaces has changed."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import BertConfig, BertForSequenceClassification, GPTQConfig, Trainer, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from models import tiny_bert
from tsqlora.libs.transformers import (
    CLASSES_OF,
    SUMS,
    installed_reporters,
    knows_lengths,
    live_note,
    packing_method,
    reporter_kinds,
    saved_note,
    set_deletion_order,
    set_loss_scaling,
    was_loaded,
)
from tsqlora.training.stop import StopCallback


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


def test_what_callbacks_share_in_a_training_is_in_no_checkpoint(tmp_path: Path) -> None:
    state = TrainerState()
    live_note(state)["files"] = ["a"]
    assert live_note(state) == {"files": ["a"]}
    state.save_to_json(str(tmp_path / "state.json"))
    assert live_note(TrainerState.load_from_json(str(tmp_path / "state.json"))) == {}


def made(folder: Path, **options: Any) -> Trainer:
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **options)
    return Trainer(tiny_bert(dtype=torch.float32), args, callbacks=[StopCallback("go on")])


def test_a_step_sums_its_batches_only_where_it_is_told_to(tmp_path: Path) -> None:
    """`loss_is_scaled_for_ga`, `model_accepts_loss_kwargs`, `label_smoother`, `current_gradient_accumulation_steps`."""
    trainer: Any = made(tmp_path)
    for accepts, divides, sums in ((True, True, True), (True, False, False), (False, True, False)):
        trainer.model_accepts_loss_kwargs = accepts
        set_loss_scaling(trainer, divides_by_window=divides)
        assert getattr(trainer, SUMS) == sums
    smoothed: Any = made(tmp_path, label_smoothing_factor=0.1)
    assert smoothed.label_smoother is not None
    source = inspect.getsource(Trainer)
    assert f"self.{SUMS}" in source
    assert "self.current_gradient_accumulation_steps =" in source


def test_the_trainers_reporters_are_known() -> None:
    """The integrations' two functions."""
    assert reporter_kinds("none") == ()
    assert [kind.__name__ for kind in reporter_kinds(["tensorboard"])] == ["TensorBoardCallback"]
    with pytest.raises(ValueError, match="nothing"):
        reporter_kinds(["nothing"])
    assert all(isinstance(name, str) for name in installed_reporters())


def test_parameters_that_a_checkpoint_lacked_are_known(tmp_path: Path) -> None:
    """`_is_hf_initialized` marks those that were loaded."""
    model = tiny_bert(dtype=torch.float32)
    assert not any(map(was_loaded, model.parameters()))
    model.bert.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert was_loaded(loaded.bert.embeddings.word_embeddings.weight)
    assert not was_loaded(loaded.classifier.weight)


def test_samplers_that_know_lengths_are_known() -> None:
    """`LengthGroupedSampler` and its kin of transformers.trainer_pt_utils."""
    assert knows_lengths(LengthGroupedSampler(2, lengths=[1, 2, 3]))
    assert not knows_lengths(SequentialSampler(range(3)))


@pytest.mark.parametrize("made_by", [lambda how: how, lambda how: how.to_dict()])
def test_the_way_of_packing_is_in_the_config(made_by: Any) -> None:
    """`config.quantization_config.quant_method`, an object or a dict."""
    config = BertConfig()
    assert packing_method(config) is None
    config.quantization_config = made_by(GPTQConfig(bits=4))
    assert packing_method(config) == "gptq"


def test_classes_of_models_are_known_by_task() -> None:
    """The mappings of transformers.models.auto.modeling_auto."""
    assert {task: names["bert"] for task, names in CLASSES_OF.items()} == {
        "token-classification": "BertForTokenClassification",
        "question-answering": "BertForQuestionAnswering",
        "masked-lm": "BertForMaskedLM",
    }
