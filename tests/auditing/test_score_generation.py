"""Scores of models that generate text: exact, whatever the padding, and the same alone or in a batch."""

from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
from peft import PeftModel, TaskType
from torch import Tensor

from models import GENERATORS, lora, text_collator, texts
from oracles import slow_scores
from scoring import assert_agree, assert_unchanged, fingerprint, score_by, trainable
from tsqlora import paper
from tsqlora.auditing.scores import Scores
from tsqlora.errors import SettingsError

N = 9
REFERENCE = [0, 2, 3, 5, 8]
BEHIND_ENCODER = ("t5", "bart", "bert + bert")


def adapted(family: str, *, unfreeze: tuple[str, ...] = ()) -> tuple[PeftModel, list[dict[str, Any]]]:
    """A LoRA model, and rows whose targets are what it says."""
    kind = TaskType.SEQ_2_SEQ_LM if family in BEHIND_ENCODER else TaskType.CAUSAL_LM
    model = lora(GENERATORS[family](), task=kind)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(6)
        if any(part in name for part in unfreeze):
            parameter.requires_grad_(True)
    return model, texts(model, N)


def mean_over_tokens(family: str) -> Any:
    """The loss of one sample as METHOD has it."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        if family not in BEHIND_ENCODER:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).reshape(1)

    return loss


def scored(model: PeftModel, rows: list[dict[str, Any]], **options: Any) -> Scores:
    options = {"collate": text_collator(model), "batch_size": 4, **options}
    return score_by(model, rows, options.pop("collate"), reference=REFERENCE, **options)


@pytest.mark.parametrize("family", GENERATORS)
def test_scores_are_the_twins(family: str) -> None:
    model, rows = adapted(family)
    before = fingerprint(model)
    scores = scored(model, rows)
    assert_unchanged(before, model)
    batches = [text_collator(model)([row]) for row in rows]
    loss = mean_over_tokens(family)
    twin = slow_scores(model, batches, sample_loss=loss, theta=trainable(model), reference=REFERENCE)
    assert_agree(scores, twin, rtol=1e-4)
    assert scores.labels.tolist() == [sum(label != -100 for label in row["labels"]) for row in rows]
    assert not scores.predictions
    assert not scores.stratified


@pytest.mark.parametrize("family", ["llama", "llama, tied", "gpt2", "t5"])
def test_an_output_head_that_trains_counts(family: str) -> None:
    model, rows = adapted(family, unfreeze=("lm_head", "embed_tokens", "wte", "shared"))
    batches = [text_collator(model)([row]) for row in rows]
    twin = slow_scores(
        model, batches, sample_loss=mean_over_tokens(family), theta=trainable(model), reference=REFERENCE
    )
    assert_agree(scored(model, rows), twin, rtol=1e-4)


@pytest.mark.parametrize("family", GENERATORS)
def test_padding_its_side_and_the_batch_change_nothing(family: str) -> None:
    model, rows = adapted(family)
    expected = scored(model, rows)
    sides = (False,) if family in BEHIND_ENCODER else (False, True)
    for left in sides:
        for pad, batch_size in ((0, 1), (5, 3), (0, N)):
            other = scored(model, rows, collate=text_collator(model, left=left, pad=pad), batch_size=batch_size)
            for name, values in expected.terms.items():
                np.testing.assert_allclose(other.terms[name], values, rtol=1e-5, atol=1e-6, err_msg=f"{name} {left}")


def test_a_model_that_writes_is_scored_as_it_begins() -> None:
    model, rows = adapted("llama")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    scores = scored(model, rows)
    assert scores.record.not_ready is None
    assert scores.record.head_start is None
    assert {"gradient_norm", "loss_reduction", "convergence"} <= scores.terms.keys()


def test_el2n_is_refused_by_name_where_it_has_a_weight() -> None:
    model, rows = adapted("llama")
    with pytest.raises(SettingsError, match="'el2n'"):
        scored(model, rows, weights={"el2n": 1.0})


@pytest.mark.parametrize("family", GENERATORS)
def test_sensitivity_is_the_mean_over_samples_alone(family: str) -> None:
    model, rows = adapted(family)
    together = paper.sensitivity(model, rows, text_collator(model), batch_size=N)
    alone = [paper.sensitivity(model, [row], text_collator(model)).values for row in rows]
    for name, value in together.values.items():
        assert value == pytest.approx(np.mean([one[name] for one in alone]), rel=1e-5)
