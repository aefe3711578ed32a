"""Token classification: a tag for each word, cross-entropy at the word's first piece; spans by their BIO tags."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import Tensor

from tsqlora.libs.shapes import Float, Int
from tsqlora.rows.batches import IGNORED
from tsqlora.rows.labels import OUTSIDE, TAGS
from tsqlora.rows.rows import tokens_at
from tsqlora.rows.table import Table
from tsqlora.rows.tokens import tokenise_words
from tsqlora.tasks.forward import model_logits
from tsqlora.tasks.reading import OF_TEXTS, TEXTS, find_labelled, load_tokenizer, pad
from tsqlora.tasks.task import Logits, evaluate

WORDS = replace(
    TEXTS,
    auto="AutoModelForTokenClassification",
    pipeline="token-classification",
    find=partial(find_labelled, tokens=True),
    encode=tokenise_words,
    collate=partial(pad, tags=True),
    logits=partial(model_logits, dimensions=3),
    # Byte-level tokenizers read words one by one only with a space before each.
    processor=partial(load_tokenizer, add_prefix_space=True),
    label=TAGS,
    problem_type=None,
    foreign={**OF_TEXTS, "data.text_pair": None},
)
"""A list of tokens, with a tag for each."""


@dataclass(frozen=True, eq=False, slots=True)
class TokenClassification:
    """The mean cross-entropy of a row's tagged tokens; labels are n × t, and -100 where a token has no tag."""

    name = "token-classification"
    headline = "span_f1"
    measured = ("span_f1", "accuracy", "loss")
    reading = WORDS
    evaluate = evaluate

    label_smoothing: float = 0.0
    tags: Sequence[Any] = ()
    """The names of the tags by id, which metrics need."""

    def loss(self, logits: Float[Tensor, "n t k"], labels: Int[Tensor, "n t"]) -> Float[Tensor, " n"]:
        """Return each row's mean over its tagged tokens; 0 without any."""
        losses = F.cross_entropy(
            logits.transpose(1, 2),
            labels,
            reduction="none",
            ignore_index=IGNORED,
            label_smoothing=self.label_smoothing,
        )
        return losses.sum(1) / (labels != IGNORED).sum(1).clamp_min(1)

    def batch_loss(self, losses: Float[Tensor, " n"], labels: Int[Tensor, "n t"]) -> Float[Tensor, ""]:
        """Return the mean over all tagged tokens of the batch."""
        tokens = (labels != IGNORED).sum(1)
        return (losses * tokens).sum() / tokens.sum().clamp_min(1)

    def metrics(self, logits: Float[np.ndarray, "n t k"], labels: Int[np.ndarray, "n t"]) -> dict[str, float]:
        """Return span_f1 (micro, exact spans), accuracy and loss of the tagged tokens."""
        tagged, predicted = labels != IGNORED, self.predictions(logits)
        z, y = torch.from_numpy(logits[tagged]).double(), torch.from_numpy(labels[tagged]).long()
        names = [str(tag) for tag in self.tags] or [str(tag) for tag in range(logits.shape[2])]

        def rows(ids: np.ndarray) -> list[list[str]]:
            return [[names[j] for j in row[own]] for row, own in zip(ids, tagged, strict=True)]

        return {
            "span_f1": span_f1(rows(labels), rows(predicted)),
            "accuracy": float((predicted == labels)[tagged].mean()) if tagged.any() else 0.0,
            "loss": float(F.cross_entropy(z, y, label_smoothing=self.label_smoothing)) if tagged.any() else 0.0,
        }

    def predictions(self, logits: Float[np.ndarray, "n t k"]) -> Int[np.ndarray, "n t"]:
        """Return the tag with the largest logit, also where a token has no tag."""
        return logits.argmax(axis=2)

    def predict(self, table: Table, *, logits: Logits, **_: Any) -> list[dict[str, Any]]:
        """Return a tag and its probability for each token; "O" and none for a token that the model did not read.

        Without labels, the first piece of each token has the token's number.
        """
        assert table.classes is not None
        z, samples = logits(table)
        names, p = table.classes.names, softmax(z.astype(np.float64), axis=2)
        unread, result = OUTSIDE if OUTSIDE in names else None, list[dict[str, Any]]()
        for i, (row, sample) in enumerate(zip(table, samples, strict=True)):
            count = len(tokens_at(row, table.columns.text))
            tags: list[Any] = [unread] * count
            probabilities: list[float | None] = [None] * count
            for place, word in enumerate(sample["labels"]):
                if word != IGNORED:
                    tags[word], probabilities[word] = names[int(p[i, place].argmax())], float(p[i, place].max())
            result.append({"prediction": tags, "probability": probabilities})
        return result


def span_f1(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    """Return the micro F1 of exact spans, as seqeval's f1_score by default; 0.0 without spans.

    >>> span_f1([["B-person", "I-person", "O"]], [["B-person", "I-person", "B-place"]])
    0.6666666666666666
    """
    own, other = ({(j, *span) for j, row in enumerate(rows) for span in spans(row)} for rows in (true, predicted))
    return 2 * len(own & other) / max(len(own) + len(other), 1)


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return kind, start and end of each span; tags without a prefix make spans of equal neighbours.

    As seqeval reads it: I- of another kind, or after O, begins a span; E-, S- end one.

    >>> spans(["B-a", "I-a", "O", "I-b", "B-b", "noun", "noun"])
    [('a', 0, 2), ('b', 3, 4), ('b', 4, 5), ('noun', 5, 7)]
    """
    result = list[tuple[str, int, int]]()
    kind, start, before = "", 0, OUTSIDE
    for j, tag in enumerate([*tags, OUTSIDE]):
        prefix, own = split_tag(tag)
        goes_on = prefix not in "BSO" and own == kind and before not in "ESO"
        if before != OUTSIDE and not goes_on:
            result.append((kind, start, j))
        if not goes_on:
            start = j
        kind, before = own, prefix
    return result


def split_tag(tag: str) -> tuple[str, str]:
    """Return the prefix B, I, E, S or O, and the kind of span; "I" for a tag without a prefix."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, dash, kind = tag.partition("-")
    return (prefix, kind) if dash and prefix in ("B", "I", "E", "S") else ("I", tag)
