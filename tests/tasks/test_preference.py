"""The DPO loss of preference pairs: TRL's, whatever the batch and the padding, and its gradients exact."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

import tsqlora as tsq
from models import GENERATORS, lora
from oracles import SlowPair, slow_dpo_loss, slow_scores
from scoring import assert_agree, assert_unchanged, fingerprint, score_by, trainable
from stock import QUIET
from tsqlora.errors import DataError
from tsqlora.rows.batches import GenerationCollator, PairCollator
from tsqlora.tasks import get_task
from tsqlora.tasks.forward import split_labels
from words import llama, tokenizer

TASK, BETA = get_task("preference"), 0.1
REFERENCE = [0, 2, 3, 5]


def pairs(n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Samples whose answers have other lengths, after prompts of 2 to 5 tokens."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        prompt = rng.integers(3, 40, rng.integers(2, 6)).tolist()
        answers = [rng.integers(3, 40, rng.integers(1, 7)).tolist() for _ in range(2)]
        ids = [prompt + answer for answer in answers]
        labels = [[-100] * len(prompt) + answer for answer in answers]
        rows.append({"input_ids": [*ids[0], *ids[1]], "labels": [*labels[0], *labels[1]], "second": len(ids[0])})
    return [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]


def collator(*, left: bool = False, pad: int = 0, multiple: int = 1) -> PairCollator:
    return PairCollator(GenerationCollator(pad, False, multiple, left))


def moved(kind: str = "llama") -> Any:
    """A model with an adapter that has learned something."""
    model = lora(GENERATORS[kind](), task=TaskType.CAUSAL_LM)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(6)
    return model


def alone(row: Any, reference: float | None) -> dict[str, Any]:
    """The keyword arguments of SlowPair for one row."""
    parts = (slice(row["second"]), slice(row["second"], None))
    answers = [(row["input_ids"][part], row["labels"][part]) for part in parts]
    return {"answers": answers, "reference": reference, "labels": torch.zeros(1)}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_the_twins_whatever_the_batch_and_the_padding(kind: str) -> None:
    model, rows = moved(kind).eval(), pairs(7)
    for j, row in enumerate(rows):
        row["reference"] = 3.0 - j
    batches = [alone(row, row["reference"]) for row in rows]
    twin = slow_scores(
        SlowPair(model), batches, sample_loss=slow_dpo_loss(BETA), theta=trainable(model), reference=REFERENCE
    )
    assert twin.loss.std() > 0.01
    for collate in (collator(), collator(pad=5, multiple=8), collator(left=True, multiple=16)):
        for size in (1, 3, 7):
            for first in range(0, 7, size):
                inputs, labels = split_labels(collate(rows[first : first + size]), model)
                losses = TASK.loss(TASK.reading.logits(model, inputs), labels).detach().double()
                torch.testing.assert_close(losses, twin.loss[first : first + size], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the DPO loss of every pair is ln 2")
@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_terms_are_the_twins(kind: str, trusted: bool) -> None:
    """Also those whose reference is the trusted pairs."""
    model, rows = moved(kind), pairs(7)
    few = pairs(4, seed=1) if trusted else []
    before = fingerprint(model)
    twin = slow_scores(
        SlowPair(model),
        [alone(row, ratio) for row, ratio in zip(rows + few, ratios(model, rows + few), strict=True)],
        sample_loss=slow_dpo_loss(BETA),
        theta=trainable(model),
        reference=[7, 8, 9, 10] if trusted else REFERENCE,
    )
    how: dict[str, Any] = {"task": TASK} | ({"trusted": few} if trusted else {"reference": REFERENCE})
    for batch_size, collate in ((3, collator()), (7, collator(left=True, multiple=8))):
        scores = score_by(model, rows, collate, batch_size=batch_size, **how)
        assert_agree(scores, twin, rtol=1e-4, rows=7)
    assert_unchanged(before, model)
    np.testing.assert_allclose(scores.terms["loss"], np.log(2), rtol=1e-5)
    assert scores.even
    assert scores.labels.tolist() == [sum(label != -100 for label in row["labels"]) for row in rows]


def ratios(model: Any, rows: list[dict[str, Any]]) -> list[float]:
    """The model's own log-ratios, which make it the reference."""
    slow = SlowPair(model).eval()
    with torch.no_grad():
        own = [float(slow(**{k: v for k, v in alone(row, 0.0).items() if k != "labels"})) for row in rows]
    model.train()
    return own


def talk(text: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def preference(j: int, kind: str) -> dict[str, Any]:
    """Prompts of two words, after which w1 is the right answer and w2 the wrong one."""
    prompt, answers = f"w{3 + j % 30} w{3 + j // 30}", ("w1", "w2")
    if kind == "texts":
        made: dict[str, Any] = {"prompt": prompt, "chosen": " w1", "rejected": " w2"}
    else:
        before = talk(prompt, "user")
        turns = [talk(answer) if kind == "chats" else [*before, *talk(answer)] for answer in answers]
        made = {"chosen": turns[0], "rejected": turns[1]} | ({"prompt": before} if kind == "chats" else {})
    return {**made, "number": j}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["texts", "chats", "whole chats"])
def test_dpo_trains_on_an_even_draw_without_the_pairs_that_are_trusted(kind: str, tmp_path: Path) -> None:
    pool = Dataset.from_list([preference(j, kind) for j in range(60)])
    trusted = [preference(j, kind) for j in range(50, 66)]
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = fingerprint(model)
    with pytest.warns(UserWarning, match="the DPO loss of every pair is ln 2"):
        chosen = tsq.select(model, pool, processing_class=tokenizer(), trusted=trusted, fraction=0.5)
    assert_unchanged({name: before[name] for name in ("weights", "trains", "modes")}, model)
    assert chosen.column_names == pool.column_names
    assert len(chosen) == 30
    assert max(chosen["number"]) < 50
    trainer = DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=2, bf16=False, **QUIET),
        train_dataset=chosen,
        processing_class=tokenizer(),
    )
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_without_trusted_rows_the_draw_is_even_and_says_so() -> None:
    with pytest.warns(UserWarning, match="ln 2.*drawn evenly"):
        chosen = tsq.select(llama(), [preference(j, "texts") for j in range(12)], processing_class=tokenizer())
    assert len(chosen) == 6


@pytest.mark.parametrize(("without", "names"), [("rejected", "rejected"), ("chosen", "chosen")])
def test_a_row_without_an_answer_is_named(without: str, names: str) -> None:
    rows = [preference(j, "texts") for j in range(12)]
    rows[7][without] = None
    with pytest.raises(DataError, match=f"'{names}' .line 8"):
        tsq.select(llama(), rows, processing_class=tokenizer())
