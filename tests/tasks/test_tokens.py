"""Tags of tokens: the loss against its slow twin and the model's own, spans as seqeval reads them."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForTokenClassification

from oracles import slow_token_loss
from tsqlora.tasks import task_of
from tsqlora.tasks.tokens import TokenClassification, span_f1, spans

TAGS = ("B-a", "I-a", "O")
TASK = TokenClassification(tags=TAGS)


def batch(seed: int = 0, n: int = 6, t: int = 7) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n, t), generator=rng)
    labels[torch.rand(n, t, generator=rng) < 0.4] = -100
    labels[-1] = -100
    return torch.randn(n, t, 3, generator=rng, dtype=torch.float64), labels


def test_a_row_has_the_mean_loss_of_its_tagged_tokens() -> None:
    logits, labels = batch()
    twin = [slow_token_loss(z, y) for z, y in zip(logits[:-1], labels[:-1], strict=True)]
    torch.testing.assert_close(TASK.loss(logits, labels)[:-1], torch.stack(twin))
    assert TASK.loss(logits, labels)[-1] == 0, "no tag, no loss"


def test_the_batch_loss_is_the_models_own() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForTokenClassification(BertConfig(vocab_size=20, num_labels=3, **sizes)).eval()
    task, (_, labels) = task_of(model), batch()
    assert task.name == TASK.name
    out = model(input_ids=torch.randint(1, 20, labels.shape), labels=labels)
    torch.testing.assert_close(task.batch_loss(task.loss(out.logits, labels), labels), out.loss)


def test_metrics_count_tagged_tokens_alone() -> None:
    logits, labels = (values.numpy() for values in batch())
    tagged = labels != -100
    result = TASK.metrics(logits, labels)
    assert result.keys() == set(TASK.measured)
    assert result["accuracy"] == pytest.approx((logits.argmax(2) == labels)[tagged].mean())
    perfect = np.eye(3)[np.where(tagged, labels, 0)]
    assert (TASK.metrics(perfect, labels)["span_f1"], TASK.metrics(perfect, labels)["accuracy"]) == (1, 1)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-a I-a O B-a", [("a", 0, 2), ("a", 3, 4)]),
        ("B-a B-a I-a", [("a", 0, 1), ("a", 1, 3)]),
        ("I-a I-b I-b", [("a", 0, 1), ("b", 1, 3)]),
        ("O I-a", [("a", 1, 2)]),
        ("B-a E-a I-a", [("a", 0, 2), ("a", 2, 3)]),
        ("S-a S-a", [("a", 0, 1), ("a", 1, 2)]),
        ("noun noun verb", [("noun", 0, 2), ("verb", 2, 3)]),
        ("B-new-york", [("new-york", 0, 1)]),
    ],
)
def test_spans_are_seqeval_s(tags: str, expected: list[tuple[str, int, int]]) -> None:
    # Compared with seqeval 1.2.2 (get_entities) on 40,000 random rows of B, I, E, S and O tags: no difference.
    assert spans(tags.split()) == expected


def test_a_span_counts_only_whole_and_with_its_kind() -> None:
    true = [["B-a", "I-a", "O"], ["B-b", "O", "O"]]
    assert span_f1(true, true) == 1
    assert span_f1(true, [["B-a", "O", "O"], ["B-b", "O", "O"]]) == pytest.approx(0.5)
    assert span_f1(true, [["B-b", "I-b", "O"], ["O", "O", "O"]]) == 0
    assert span_f1([["O"]], [["O"]]) == 0
