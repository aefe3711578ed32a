"""Answers that belong to other prompts are left out before training, where the rows' own faults show how."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithFlattening, LlamaForCausalLM, Trainer, TrainingArguments

import tsqlora as tsq
from tsqlora.auditing.reasons import explain_row
from tsqlora.auditing.scores import Scores
from tsqlora.auditing.texts.answers import Turn, turns_in
from tsqlora.auditing.texts.look import FOREIGN, SWAPPED, look_at_answers
from tsqlora.auditing.texts.prepared import sequences_of
from tsqlora.auditing.texts.unfit import PACKED, look_before
from tsqlora.auditing.texts.vocabulary import vocabulary_of
from tsqlora.errors import SettingsError
from tsqlora.model.request import Compute
from tsqlora.rows.batches import GenerationCollator, PairCollator
from tsqlora.tasks import get_task
from words import llama, tokenizer

ROWS, WORDS, END, USER, ASSISTANT = 240, range(5, 45), 1, 3, 4
FOREIGN_ROWS = tuple(range(10, 34))
"""Each has the answer of the row after it."""
COMMON: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


class Repeats(LlamaForCausalLM):
    """Expects words that it has read before, as a trained model expects those of the prompt."""

    def forward(self, input_ids: Any = None, labels: Any = None, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        own: dict[str, Any] = {"input_ids": input_ids, "labels": labels, "logits_to_keep": logits_to_keep}
        output, kept = super().forward(**own, **kwargs), logits_to_keep
        seen = torch.nn.functional.one_hot(input_ids, self.config.vocab_size).cumsum(1).clamp_max(1)
        output.logits = output.logits + 4.0 * (seen[:, -kept:] if kept else seen)
        return output


def samples(foreign: tuple[int, ...] = FOREIGN_ROWS) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    words = [rng.permutation(list(WORDS))[:6].tolist() for _ in range(ROWS)]
    rows = []
    for j, own in enumerate(words):
        answer = words[(j + 1) % ROWS] if j in foreign else own
        prompt = [USER, *own, ASSISTANT]
        answer = [*rng.permutation(answer).tolist(), END]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def model() -> LlamaForCausalLM:
    return Repeats(llama().config).eval()


def test_stretches_with_loss_are_answers() -> None:
    first = samples()[0]
    (turn,) = turns_in(sequences_of([first]), vocabulary_of(tokenizer()))
    assert turn.prompt.tolist() == first["input_ids"][:8]
    assert (turn.answer.tolist(), turn.ends) == (first["input_ids"][8:-1], True)
    two = turns_in(sequences_of(samples()[:2]), vocabulary_of(tokenizer()))
    assert [turn.opening.tolist() for turn in two] == [[ASSISTANT]] * 2


def test_answers_of_other_prompts_are_found() -> None:
    look = look_before(model(), samples(), vocabulary_of(tokenizer()), Compute(16))
    assert set(look.rows(FOREIGN)) <= set(FOREIGN_ROWS)
    assert len(look.rows(FOREIGN)) >= 0.8 * len(FOREIGN_ROWS)


def pairs(swapped: Sequence[int], *, alike: bool = False) -> list[Turn]:
    """The rejected answer is that of another row, or one in the same manner; swapped pairs prefer it."""
    own = turns_in(sequences_of(samples(())), vocabulary_of(tokenizer()))
    other = own if alike else turns_in(sequences_of(samples(tuple(range(ROWS)))), vocabulary_of(tokenizer()))
    sides = ("chosen", "rejected")
    return [
        replace(one, side=sides[(side + (one.row in swapped)) % 2])
        for two in zip(own, other, strict=True)
        for side, one in enumerate(two)
    ]


@pytest.mark.parametrize("swapped", [(), FOREIGN_ROWS])
def test_swapped_pairs_are_found_by_the_majority(swapped: tuple[int, ...]) -> None:
    look = look_at_answers(model(), pairs(swapped), vocabulary_of(tokenizer()), Compute(16))
    assert {*look.rows(SWAPPED)} <= {*swapped}
    assert len(look.rows(SWAPPED)) >= 0.8 * len(swapped)
    assert look.detections[SWAPPED].recall > 0.8


def test_where_the_sides_do_not_differ_no_pair_is_called_swapped() -> None:
    look = look_at_answers(model(), pairs(FOREIGN_ROWS, alike=True), vocabulary_of(tokenizer()), Compute(16))
    assert not look.rows(SWAPPED)
    first = look.sentences()[0]
    assert first.startswith("swapped_pair: this model cannot tell")
    assert "%" not in first


def test_where_all_answers_fit_none_is_called_wrong() -> None:
    look = look_before(model(), samples(()), vocabulary_of(tokenizer()), Compute(16))
    assert not look.rows(FOREIGN)
    assert look.detections[FOREIGN].recall > 0.5


@pytest.mark.filterwarnings("ignore:text without trusted rows is drawn evenly")
@pytest.mark.filterwarnings("ignore:.*of 240 rows these are left out")
@pytest.mark.filterwarnings("ignore:.*of 80 rows these are left out")
@pytest.mark.filterwarnings("ignore:rows are packed")
@pytest.mark.parametrize(("flat", "packed"), [(False, 1), (True, 1), (True, 3)])
def test_a_training_leaves_them_out(flat: bool, packed: int, tmp_path: Path) -> None:
    rows = samples()
    parts = [rows[k : k + packed] for k in range(0, ROWS, packed)]
    rows = [{name: [j for one in some for j in one[name]] for name in ("input_ids", "labels")} for some in parts]
    for row, some in zip(rows, parts, strict=True) if packed > 1 else ():  # as TRL's `bfd` packs them
        row["position_ids"] = [j for one in some for j in range(len(one["input_ids"]))]
    wrong = {j // packed for j in FOREIGN_ROWS}
    data = tsq.QualitySubset(rows, 0.5)
    callback = tsq.QualityCallback(data)
    args = TrainingArguments(str(tmp_path), num_train_epochs=1, **COMMON)
    collate = DataCollatorWithFlattening() if flat else None  # as TRL's `padding_free`
    options: dict[str, Any] = {"data_collator": collate, "callbacks": [callback], "processing_class": tokenizer()}
    Trainer(model(), args, train_dataset=data, **options).train()
    assert (PACKED in callback.notes) == (packed > 1)
    scores = Scores.load(tmp_path / "scores.parquet")
    left_out = scores.left_out_as("foreign answer")
    assert set(scores.row_ids[left_out].tolist()) <= wrong
    assert left_out.sum() >= 0.8 * len(wrong)
    assert scores.predictions["wrong_probability"][left_out].min() > 0.5
    assert any("foreign_answer" in note for note in callback.notes)
    assert any(f"{left_out.sum()} as 'foreign answer'" in note for note in callback.notes)


def test_what_to_drop_is_named_exactly() -> None:
    with pytest.raises(SettingsError, match="drop is 'evidnt'; give 'evident'"):
        tsq.select(model(), [{"text": "a"}], processing_class=tokenizer(), drop="evidnt")  # type: ignore[arg-type]


def pair_samples(swapped: Sequence[int]) -> list[dict[str, Any]]:
    """Prepared pairs, as `tokenise_pairs` makes them: the rejected answer is that of the row after it."""
    rows = []
    for j, two in enumerate(zip(samples(()), samples(tuple(range(ROWS))), strict=True)):
        one, other = two[::-1] if j in swapped else two
        both = {name: [*one[name], *other[name]] for name in one}
        rows.append({**both, "attention_mask": [1] * len(both["labels"]), "second": len(one["labels"])})
    return rows


class Prefers(Trainer):
    """Trains on the DPO loss of our own pairs."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:  # type: ignore[override]
        task = get_task("preference")
        return task.loss(task.reading.logits(model, inputs), inputs["labels"]).mean()


@pytest.mark.filterwarnings("ignore:.*of 240 rows these are left out")
@pytest.mark.parametrize("copies", [(), range(40, 56)])
def test_a_training_leaves_swapped_pairs_out(copies: Sequence[int], tmp_path: Path) -> None:
    """Also where some pairs are trusted: these are mixed in, and decide nothing."""
    trusted = [pair_samples(())[j] for j in copies]
    data = tsq.QualitySubset(pair_samples(FOREIGN_ROWS), 0.5, trusted=trusted)
    collate = PairCollator(GenerationCollator(0, False, 8, False))
    callback = tsq.QualityCallback(data, task=get_task("preference"))
    args = TrainingArguments(str(tmp_path), max_steps=2, remove_unused_columns=False, **COMMON)
    options: dict[str, Any] = {"processing_class": tokenizer(), "data_collator": collate}
    Prefers(model(), args, train_dataset=data, callbacks=[callback], **options).train()
    scores = Scores.load(tmp_path / "scores.parquet")
    left_out = scores.row_ids[scores.left_out_as("swapped pair")].tolist()
    assert {*left_out} <= {*FOREIGN_ROWS}
    assert len(left_out) >= 0.8 * len(FOREIGN_ROWS)
    assert scores.row_ids[scores.left_out_as("trusted row")].tolist() == [*copies]
    assert scores.even
    assert data.plan.asks is None
    assert {*range(ROWS, ROWS + len(copies))} <= {*data.draw(0).tolist()}
    assert any("swapped_pair" in note for note in callback.notes)
    assert any(f"{len(left_out)} as 'swapped pair'" in note for note in callback.notes)
    assert "most pairs" in explain_row(scores, left_out[0])["why"]


@pytest.mark.filterwarnings("ignore:the DPO loss of every pair is ln 2")
@pytest.mark.parametrize(
    ("fault", "faulty", "trusted"),
    [
        ("foreign_answer", FOREIGN_ROWS, False),
        ("swapped_pair", (), False),
        ("swapped_pair", FOREIGN_ROWS, False),
        ("swapped_pair", FOREIGN_ROWS, True),
    ],
)
def test_a_selection_for_another_trainer_leaves_them_out(fault: str, faulty: tuple[int, ...], trusted: bool) -> None:
    rng, rows = np.random.default_rng(0), []
    words = [[f"w{j}" for j in rng.permutation(40)[:6]] for _ in range(ROWS)]
    for j, own in enumerate(words):
        sides = [" " + " ".join(rng.permutation(answer)) for answer in (own, words[(j + 1) % ROWS])]
        chosen, rejected = sides[::-1] if j in faulty else sides
        answers = {"chosen": chosen, "rejected": rejected} if fault == "swapped_pair" else {"completion": chosen}
        rows.append({"prompt": " ".join(own), **answers, "number": j})
    few = [{**row, "prompt": f"w0 {row['prompt']}"} for row in rows[40:56]] if trusted else None
    plain = tokenizer()
    plain.chat_template = None
    with warnings.catch_warnings(record=True) as texts:
        warnings.simplefilter("always")
        chosen = tsq.select(model(), rows, processing_class=plain, trusted=few, fraction=1.0, drop="evident")
    left_out = {*range(ROWS)} - {*chosen["number"]}
    assert any(f"{fault}: " in str(one.message) and "would list" in str(one.message) for one in texts)
    assert left_out <= {*faulty}
    assert len(left_out) >= (0.8 if fault == "swapped_pair" else 0.5) * len(faulty)
