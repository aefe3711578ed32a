"""Rows of a pool for any trainer: what comes back, and which rows those are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Audio, ClassLabel, Dataset, Features, Image
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
)

import tsqlora as tsq
from tsqlora.errors import DataError, SettingsError
from tsqlora.rows.sources import folder_rows
from words import llama, tokenizer

TOKENIZER = tokenizer()


def adapted() -> Any:
    torch.manual_seed(0)
    return get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def pairs(words: range, answer: str) -> list[dict[str, str]]:
    return [{"prompt": f"w3 w{word}", "completion": f" {answer}", "note": f"{word} {answer}"} for word in words]


def test_rows_like_the_trusted_ones_are_drawn() -> None:
    pool = Dataset.from_list([*pairs(range(40), "w1"), *pairs(range(40), "w2")])
    trusted = pairs(range(5, 25), "w1")
    chosen = tsq.select(adapted(), pool, processing_class=TOKENIZER, trusted=trusted, fraction=0.25)
    assert isinstance(chosen, Dataset)
    assert chosen.column_names == pool.column_names
    assert len(chosen) == 20
    assert sum(row["completion"] == " w1" for row in chosen) >= 14
    # A row with the prompt of a trusted one leaves the pool, whatever its answer.
    assert not {row["prompt"] for row in chosen} & {row["prompt"] for row in trusted}


def talk(word: int) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": f"w{word}"}, {"role": "assistant", "content": "w1"}]}


@pytest.mark.filterwarnings("ignore:the DPO loss of every pair is ln 2", "ignore:3 trusted rows are too few")
@pytest.mark.parametrize("of", ["chats", "preferences", "texts"])
def test_every_kind_of_text_has_its_rows(of: str) -> None:
    rows = {
        "chats": [talk(j) for j in range(12)],
        "preferences": [{"prompt": f"w{j}", "chosen": " w1", "rejected": " w2"} for j in range(12)],
        "texts": [{"text": f"w{j} w1 w2"} for j in range(12)],
    }[of]
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = tsq.select(model, rows, processing_class=TOKENIZER, trusted=rows[:3], fraction=0.5)
    assert len(chosen) == 6
    assert all(row in rows[3:] for row in chosen)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_read_is_named() -> None:
    with pytest.raises(SettingsError, match="stream"):
        tsq.select(adapted(), iter(pairs(range(3), "w1")), processing_class=TOKENIZER)
    with pytest.raises(DataError, match=r"dataset.rename_columns\({'a': 'prompt', 'b': 'completion'}\)$"):
        tsq.select(adapted(), [{"a": "w1", "b": "w2"}], processing_class=TOKENIZER)
    trusted = [{"prompt": row["prompt"]} for row in pairs(range(3), "w1")]
    with pytest.raises(DataError, match=r"trusted has no column 'completion'.*: 'prompt'$"):
        tsq.select(llama(), pairs(range(9), "w1"), processing_class=TOKENIZER, trusted=trusted)


def test_a_list_of_dicts_keeps_the_columns_that_its_first_row_lacks() -> None:
    rows = [{"instruction": f"w{j}", **({"input": "w9"} if j % 2 else {}), "output": "w1"} for j in range(8)]
    chosen = tsq.select(adapted(), rows, processing_class=TOKENIZER, fraction=1.0)
    assert [{name: value for name, value in row.items() if value is not None} for row in chosen] == rows


@pytest.mark.filterwarnings("ignore:rows are drawn evenly")  # by some random heads
@pytest.mark.parametrize(("kind", "inside"), [("image", False), ("audio", True)], ids=["files", "bytes"])
def test_images_and_recordings_are_drawn_from_their_columns(kind: str, inside: bool, tmp_path: Path) -> None:
    made_media = pytest.importorskip("made_media")
    write, save = made_media.MAKE[kind]
    files = [row for _, row in folder_rows(write(tmp_path / "data", 24), kind)]
    names = sorted({row["label"] for row in files})
    rows = [{"media": row[kind], "label": names.index(row["label"])} for row in files]
    if inside:
        rows = [{**row, "media": {"path": None, "bytes": Path(row["media"]).read_bytes()}} for row in rows]
    feature = (Image if kind == "image" else Audio)(decode=False)  # torchcodec would decode recordings
    pool = Dataset.from_list(rows).cast(Features(media=feature, label=ClassLabel(names=names)))
    path = save(tmp_path / "model")
    auto, reader = (
        (AutoModelForImageClassification, AutoImageProcessor)
        if kind == "image"
        else (AutoModelForAudioClassification, AutoFeatureExtractor)
    )
    model, processor = auto.from_pretrained(path, num_labels=2), reader.from_pretrained(path)
    chosen = tsq.select(model, pool, processing_class=processor, trusted=pool.select(range(0, 24, 3)), fraction=0.5)
    assert chosen.features == pool.features
    assert len(chosen) == 12
    trusted = [row["media"] for row in pool.select(range(0, 24, 3)).to_list()]
    assert not [row for row in chosen.to_list() if row["media"] in trusted], (
        "trusted rows leave the pool, by their content"
    )


def test_rows_without_an_answer_are_left_out_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*pairs(range(40), "w1"), {"prompt": "w1", "completion": " ", "note": ""}]
    with pytest.warns(UserWarning, match="no target in column 'completion'") as caught:
        chosen = tsq.select(adapted(), rows, processing_class=TOKENIZER, fraction=1.0)
    assert len(chosen) == 40
    assert sum("left out" in str(one.message) for one in caught) == 1
    assert not any("drawn evenly" in str(one.message) for one in caught), "all rows are returned"
    assert "look at 40 rows:   0%" in capsys.readouterr().err
