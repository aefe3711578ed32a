"""A look applied to rows, one batch at a time: the columns of rows judged together, and independence of the batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model

import tsqlora as tsq
from models import collate
from stock import base_bert, moods
from tsqlora import paper
from tsqlora.auditing.saved_look import SavedLook
from tsqlora.errors import UnsupportedError

SEEN, NEW = moods(240), moods(120, seed=7)
WRONG = [*range(0, 240, 12)]


def bert() -> Any:
    torch.manual_seed(0)
    return get_peft_model(base_bert(), LoraConfig(r=2, target_modules=["query"], task_type=TaskType.SEQ_CLS))


@pytest.fixture(scope="module")
def look(tmp_path_factory: pytest.TempPathFactory) -> SavedLook:
    """Of rows of which every twelfth has a wrong label."""
    rows = [{**row, "labels": 1 - row["labels"]} if j in WRONG else row for j, row in enumerate(SEEN)]
    names = paper.RowNames(hashes=[str(j) for j in range(len(rows))])
    return tsq.look(bert(), rows, collate, out=tmp_path_factory.mktemp("look") / "LOOK", rows=names)


def test_a_row_does_not_depend_on_its_batch(look: SavedLook) -> None:
    model = bert()
    together = look.of(model, collate(NEW[:10]))
    for j in (0, 4, 9):
        alone = look.of(model, collate([NEW[j]]))
        assert alone["reason"] == together["reason"][[j]]
        for name in alone.keys() - {"reason"}:
            np.testing.assert_allclose(alone[name][0], together[name][j], rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_columns_of_seen_rows_are_those_of_the_look(look: SavedLook) -> None:
    places = [3, 12, 100]
    columns = look.of(bert(), collate([SEEN[j] for j in places]), hashes=[str(j) for j in places])
    for name, values in look.scores.predictions.items():
        np.testing.assert_array_equal(columns[name], values[places], err_msg=name)


def test_the_model_is_left_as_it_was(look: SavedLook) -> None:
    model = bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tsq.apply(model, str(look.path), collate(NEW[:4]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_in_parts_is_refused(look: SavedLook) -> None:
    with pytest.raises(UnsupportedError, match="meta"):
        look.of(bert().to("meta"), collate(NEW[:4]))


def test_applying_is_close_to_judging_all_rows_together(look: SavedLook, tmp_path: Path) -> None:
    together = tsq.look(bert(), SEEN + NEW, collate, out=tmp_path / "LOOK").scores.predictions
    columns = look.of(bert(), collate(NEW))
    assert (columns["predicted"] == together["predicted"][len(SEEN) :]).mean() > 0.95


def evident(look: SavedLook) -> SavedLook:
    """The look as if it had evidence of wrong labels."""
    assert look.verdict is not None
    return replace(look, verdict=replace(look.verdict, evident=True))


def test_a_class_that_the_look_has_not_seen_is_null_with_a_reason(look: SavedLook) -> None:
    batch = collate(NEW[:4])
    batch["labels"] = torch.tensor([NEW[0]["labels"], 7, -1, NEW[3]["labels"]])
    look = evident(look)
    columns, plain = look.of(bert(), batch), look.of(bert(), collate(NEW[:4]))
    assert columns["reason"].tolist() == [plain["reason"][0], "unseen class", "unseen class", plain["reason"][3]]
    for name in ("loss", "label_probability", "wrong_probability"):
        np.testing.assert_array_equal(np.isnan(columns[name]), [False, True, True, False], err_msg=name)
        np.testing.assert_array_equal(columns[name][[0, 3]], plain[name][[0, 3]], err_msg=name)
    np.testing.assert_array_equal(columns["predicted"], plain["predicted"])
    assert columns["labels"].tolist() == [NEW[0]["labels"], -1, -1, NEW[3]["labels"]]


def test_likely_wrong_labels_have_their_reason(look: SavedLook) -> None:
    columns = evident(look).of(bert(), collate(NEW))
    np.testing.assert_array_equal(columns["reason"] == "confident negative", columns["wrong_probability"] > 0.2)
