"""A look in a folder: what it holds, and its head written into another model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn

import tsqlora as tsq
from models import collate
from stock import base_bert, moods
from tsqlora.auditing.saved_look import SavedLook
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.model.request import ScoringRule

ROWS = moods(96)


def bert() -> Any:
    return get_peft_model(base_bert(), LoraConfig(r=2, target_modules=["query"], task_type=TaskType.SEQ_CLS))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedLook:
    """The look at the rows, in a folder."""
    return tsq.look(bert(), ROWS, collate, out=tmp_path_factory.mktemp("look") / "LOOK")


def head_of(model: nn.Module) -> Tensor:
    return next(p for n, p in model.named_parameters() if n.endswith("modules_to_save.default.weight"))


def test_the_folder_holds_scores_head_and_origin(saved: SavedLook) -> None:
    assert sorted(path.name for path in saved.path.iterdir()) == [
        "head.safetensors",
        "judge.safetensors",
        "look.json",
        "scores.parquet",
    ]
    again = SavedLook.load(saved.path)
    assert np.array_equal(again.scores.quality, saved.scores.quality)
    assert set(again.head) == {"classifier.weight", "classifier.bias"}
    assert again.about["rows"] == len(ROWS)


def test_the_model_of_the_look_stays_as_it_was(tmp_path: Path) -> None:
    model = bert()
    before = head_of(model).clone()
    tsq.look(model, ROWS, collate, out=tmp_path / "LOOK")
    assert torch.equal(head_of(model), before)


@pytest.mark.parametrize("adapted", [True, False])
def test_the_head_is_written_where_the_model_has_it(adapted: bool, saved: SavedLook) -> None:
    model = bert() if adapted else base_bert()
    assert saved.write_head(model) is None
    weight = head_of(model) if adapted else model.classifier.weight
    torch.testing.assert_close(weight, saved.head["classifier.weight"], rtol=0, atol=0)


def test_a_head_of_another_width_is_left_out_and_says_so(saved: SavedLook) -> None:
    model = base_bert()
    model.classifier = nn.Linear(5, 2)
    before = model.classifier.weight.clone()
    assert "5" in str(saved.write_head(model))
    assert torch.equal(model.classifier.weight, before)


def test_a_head_of_another_model_is_left_out_and_says_so(tmp_path: Path) -> None:
    judge, model = bert(), bert()
    judge.config.name_or_path, model.config.name_or_path = "small", "large"
    look = tsq.look(judge, ROWS, collate, out=tmp_path / "LOOK")
    assert "small" in str(look.write_head(model))


def test_a_head_that_would_not_be_trained_is_refused(saved: SavedLook) -> None:
    model = base_bert().requires_grad_(False)
    with pytest.raises(SettingsError, match="modules_to_save"):
        saved.write_head(model)


def test_a_parameter_without_data_is_refused_by_name(saved: SavedLook) -> None:
    with pytest.raises(UnsupportedError, match=r"classifier\.weight"):
        saved.write_head(base_bert().to("meta"))


@pytest.mark.parametrize("kind", ["meta", "ds_id"])
def test_a_look_at_a_model_in_parts_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    model = bert()
    if kind == "meta":
        model = model.to("meta")
    else:
        head_of(model).ds_id = 3  # pyright: ignore[reportAttributeAccessIssue]  # as deepspeed.zero.Init marks it
    with pytest.raises(UnsupportedError, match=r"(?s)embeddings|modules_to_save.*tsqlora look"):
        tsq.look(model, ROWS, collate, out=tmp_path / "LOOK")
    assert not (tmp_path / "LOOK").exists()


def test_other_rows_are_refused(saved: SavedLook) -> None:
    with pytest.raises(DataError, match="96"):
        saved.require_rows(ROWS[:95], None, None)
    with pytest.raises(DataError, match="rows"):
        saved.require_rows(ROWS[1:] + ROWS[:1], None, None)
    saved.require_rows(ROWS, None, None)


def test_a_folder_that_is_no_look_and_one_that_is_taken_are_refused(saved: SavedLook, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tsqlora look"):
        SavedLook.load(tmp_path)
    with pytest.raises(SettingsError, match="not empty"):
        tsq.look(bert(), ROWS, collate, out=saved.path)


def test_a_rule_that_the_look_was_not_taken_with_is_refused(saved: SavedLook) -> None:
    saved.require_rule(ScoringRule(seed=7, look_again=False))
    with pytest.raises(SettingsError, match="weights"):
        saved.require_rule(ScoringRule(weights={"loss": 1.0}))
