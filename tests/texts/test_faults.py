"""Planted faults: where they come from, and what is concluded from how a model reads them."""

from collections.abc import Sequence
from itertools import cycle
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from byte_tokenizers import byte_tokenizer
from texts.test_ledger import TEMPLATE, chat, trained
from tsqlora.auditing.texts import answers, faults
from tsqlora.auditing.texts import look as text_look
from tsqlora.auditing.texts.answers import Turn, turns_of
from tsqlora.auditing.texts.faults import (
    ALIKE,
    cut_place,
    detect,
    disordered,
    donors_of,
    folds_of,
    judged,
    p_of,
)
from tsqlora.auditing.texts.look import CUT, FOREIGN, AnswerLook, look_at_answers
from tsqlora.auditing.texts.unfit import in_one_line
from tsqlora.auditing.texts.vocabulary import Vocabulary, vocabulary_of
from tsqlora.model.request import Compute

NONE = np.empty(0, np.int64)
WORDS = (
    "river mountain kitchen garden winter harbour violin engine forest market planet bridge castle desert quiet golden "
    "broken distant narrow ancient bright hidden frozen gentle heavy hollow silver crooked"
)
SUBJECTS = WORDS.split()


def turn(row: int, question: str, text: str) -> Turn:
    return Turn(row, "", NONE, NONE, NONE, True, question, text)


def scores(rng: np.random.Generator, n: int, share: float, apart: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores of n rows, of which a share is faulty, and of 400 planted ones."""
    faulty = np.arange(n) < round(share * n)
    return np.where(faulty, rng.normal(apart, 1, n), rng.normal(0, 1, n)), rng.normal(apart, 1, 400)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.4])
def test_the_share_of_faults_lies_under_the_upper_bound_in_95_of_100_draws(share: float) -> None:
    below = [detect(*scores(np.random.default_rng([7, k]), 800, share, 3.0)).high >= share for k in range(40)]
    assert np.mean(below) >= 0.95


def test_rates_of_separable_faults_are_right() -> None:
    for share in (0.0, 0.1, 0.3):
        result = detect(*scores(np.random.default_rng(1), 1000, share, 6.0))
        assert result.rate == pytest.approx(share, abs=0.05)
        assert bool(len(result.listed)) == (share > 0)
        assert result.recall > 0.9


@pytest.mark.parametrize("apart", [0.3, 1.0, 2.0, 4.0])
def test_a_table_without_faults_lists_none(apart: float) -> None:
    for k in range(10):
        result = detect(*scores(np.random.default_rng([9, k]), 600, 0.0, apart))
        assert not len(result.listed), apart


def test_without_power_rows_are_ordered_and_none_is_called_wrong() -> None:
    result = detect(*scores(np.random.default_rng(2), 1000, 0.3, 0.8))
    assert not result.usable
    assert not len(result.listed)


def planted_afresh(rng: np.random.Generator, own: np.ndarray, planted: np.ndarray, apart: float) -> tuple[float, int]:
    """Plant new faults in 5 % of the rows, and return the share of them that the rule lists, and its other rows."""
    rows = rng.permutation(len(own))[: round(0.05 * len(own))]
    own = own.copy()
    own[rows] = rng.normal(apart, 1, len(rows))
    listed = judged(own, planted).listed
    return float(np.isin(rows, listed).mean()), len(np.setdiff1d(listed, rows))


AREAS = (0.5, 0.58, 0.76, 0.86, 0.92, 0.98)
"""Of detectors: from none to one that tells nearly all planted faults from rows as they are."""


@pytest.mark.parametrize(
    ("area", "share"), [*zip(AREAS, cycle([0.0, 0.05, 0.2]), strict=False), (0.5, 0.2), (0.86, 0.05), (0.98, 0.0)]
)
def test_what_could_have_been_found_is_what_faults_planted_afresh_give(
    area: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "DRAWS", 8)  # the mean is of 200 times as many
    apart, printed, true = float(2**0.5 * norm.ppf(area)), [], []
    for k in range(200):
        rng = np.random.default_rng([11, k])
        own, planted = scores(rng, 300, share, apart)
        printed.append(detect(own, planted).recall)
        true += [planted_afresh(rng, own, planted, apart)[0] for _ in range(4)]
    assert np.mean(printed) == pytest.approx(np.mean(true), abs=0.03)
    if area < 0.75:
        assert not detect(own, planted).usable


def test_planted_rows_have_a_uniform_p() -> None:
    planted = np.random.default_rng(4).normal(size=500)
    assert p_of(planted, planted).mean() == pytest.approx(0.5)


def test_turns_of_a_row_and_of_equal_prompts_share_a_fold() -> None:
    turns = [
        turn(0, "How?", "a"),
        turn(0, "Why?", "b"),
        turn(1, "why", "c"),
        *(turn(k, f"Q{k}", "d") for k in range(2, 60)),
    ]
    folds = folds_of(turns, seed=0)
    assert folds[0] == folds[1] == folds[2]
    assert {*folds.tolist()} == set(range(5))


def test_donors_are_of_the_fold_and_fit_neither_in_prompt_nor_in_answer() -> None:
    texts = [f"{SUBJECTS[k % 14]} {SUBJECTS[14 + k // 14]}" for k in range(100)]
    turns = [turn(k, f"Tell me of the {text}", f"{text} is what you asked for") for k, text in enumerate(texts)]
    folds = folds_of(turns, seed=0)
    donors = donors_of(turns, folds, np.arange(100), np.random.default_rng(0))
    assert (folds[donors[donors >= 0]] == folds[donors >= 0]).all()
    for row in np.flatnonzero(donors >= 0):
        for a, b in ((turns[row].question, turns[donors[row]].question), (turns[row].text, turns[donors[row]].text)):
            one, other = {*a.lower().split()}, {*b.lower().split()}
            assert len(one & other) / len(one | other) <= ALIKE


def test_a_cut_lies_behind_a_word_and_not_behind_a_sentence() -> None:
    texts = [b"One", b" sen", b"tence", b" is", b" he", b"re", b".", b" Ano", b"ther", b" fol", b"lows", b" it", b"."]
    places = {cut_place(texts, np.random.default_rng(k)) for k in range(50)}
    assert places == {1, 3, 4, 9, 11}
    unspaced = [character.encode() for character in "我们在这里看到一个很长的句子。还有一个"]
    assert cut_place(unspaced, np.random.default_rng(0)) > 0  # scripts without blanks can be cut, too
    assert 15 not in {cut_place(unspaced, np.random.default_rng(k)) for k in range(99)}


def test_disorder_keeps_the_sentences() -> None:
    rng = np.random.default_rng(0)
    assert sorted(disordered("", "One. Two. Three.", rng).split()) == ["One.", "Three.", "Two."]
    assert disordered("", "One. Two. Three.", rng) != "One. Two. Three."
    assert disordered("", "One. Two.", rng) == "One. One. Two."
    assert disordered("", "One alone.", rng) == "One alone."


def test_answers_that_are_labels_are_not_judged() -> None:
    turns = [turn(k, f"Is {k} even?", "no" if k % 2 else "yes") for k in range(100)]
    result = look_at_answers(nn.Identity(), turns, Mock(spec=Vocabulary), Compute(1))
    assert (result.detections, "audit them as labels" in result.notes[0]) == ({}, True)


class Copies(nn.Module):
    """A language model that writes words of its context again: bigrams that it has read are likely."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.size = nn.Parameter(torch.zeros(1)), size

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        n, t = input_ids.shape
        triples = torch.stack([input_ids.roll(2, 1), input_ids.roll(1, 1), input_ids], 2)
        logits = torch.zeros(n, t, self.size)
        for k in range(2, t):
            same = (triples[:, 2:k, 0] == input_ids[:, k - 1, None]) & (triples[:, 2:k, 1] == input_ids[:, k, None])
            same &= attention_mask[:, : k - 2].bool()
            logits[:, k].scatter_add_(1, triples[:, 2:k, 2], 6.0 * same)
        return SimpleNamespace(logits=logits.clamp_max(6.0))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = byte_tokenizer(opens=False, closes=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def look(
    tokenizer: Any, vocabulary: Vocabulary, wrong: Sequence[int] = (), size: int = 140, long: Sequence[int] = ()
) -> AnswerLook:
    """Look at rows whose answers repeat words of their prompts; `wrong` rows have the next row's answer.

    In `long` prompts these words stand in the middle.
    """
    rng = np.random.default_rng(5)
    words = [" ".join(rng.choice(SUBJECTS, 4, replace=False)) for _ in range(size)]
    rows = [
        chat(
            f"Write {'a ' * 60 * (k in long)}on {words[k]}{' b' * 60 * (k in long)}",
            f"{words[(k + 1) % size if k in wrong else k]}, so it is.",
            row=k,
        )
        for k in range(size)
    ]
    turns = [one for row in rows for one in turns_of(row, [trained(tokenizer, row)], vocabulary)]
    return look_at_answers(Copies(len(tokenizer)), turns, vocabulary, Compute(batch_size=32))


def test_answers_of_the_next_rows_are_found_and_their_shift_is_named(tokenizer: Any) -> None:
    wrong = set(range(40, 58))
    result = look(tokenizer, vocabulary_of(tokenizer), [*wrong])
    rows = set(result.rows(FOREIGN))
    assert len(rows & wrong) >= 16
    assert len(rows - wrong) <= 1
    ((first, last, step),) = result.shifts
    assert step == 1
    assert {*range(first, last + 1)} <= rows  # what is announced is listed
    assert result.detections[FOREIGN].rate == pytest.approx(18 / 140, abs=0.04)
    assert 0.5 < result.detections[FOREIGN].recall <= 1


def test_an_answer_about_the_middle_of_a_long_prompt_is_not_foreign(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (answers, text_look):
        monkeypatch.setattr(module, "MOST_PROMPT", 120)
    wrong, long = set(range(40, 58)), set(range(100, 110))
    result = look(tokenizer, vocabulary_of(tokenizer), [*wrong], long=[*long])
    rows = set(result.rows(FOREIGN))
    assert len(rows & wrong) >= 9, "others are no suspects: 15 % are"
    assert not rows & long
    assert result.tokens["whole"]
    assert any(text.startswith("10 of 140 prompts have more than 120 tokens") for text in result.sentences())
    monkeypatch.setattr(answers, "WHOLE", 120)
    unread = look(tokenizer, vocabulary_of(tokenizer), [*wrong], long=[*long])
    assert set(unread.rows(FOREIGN)) & long, "both ends alone do not say what the answer is about"


def test_good_answers_are_left_alone(tokenizer: Any) -> None:
    result = look(tokenizer, vocabulary_of(tokenizer))
    assert not result.rows(FOREIGN)
    assert not result.rows(CUT)


@pytest.mark.parametrize("seed", range(6))
def test_a_model_of_random_weights_calls_no_clean_answer_wrong_and_says_that_it_cannot_tell(
    tokenizer: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.3}
    config = LlamaConfig(**sizes)
    rng, vocabulary = np.random.default_rng(seed), vocabulary_of(tokenizer)
    rows = []
    for k in range(130):
        one, other = rng.choice(SUBJECTS, 2, replace=False)
        long = " ".join(rng.choice(SUBJECTS, int(rng.lognormal(2, 0.8)) + 1))
        answer = f"The number is {k % 9} for this question." if k % 8 == 0 else f"Of the {one}: {long}."
        rows.append(chat(f"What of the {one} and the {other} in {k}?", answer, row=k))
    turns = [one for row in rows for one in turns_of(row, [trained(tokenizer, row)], vocabulary)]
    result = look_at_answers(LlamaForCausalLM(config).eval(), turns, vocabulary, Compute(batch_size=32))
    assert {name for name in result.detections if result.rows(name)} == set()
    assert not result.detections[CUT].usable
    assert "cannot tell" in result.sentences()[0]
    assert "%" not in result.sentences()[0]
    assert "cannot tell" in in_one_line(result, {}, 130).split(";")[0]


def test_the_end_of_a_long_answer_is_judged_and_what_is_not_read_is_counted(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (answers, text_look):
        monkeypatch.setattr(module, "MOST_ANSWER", 16)
    result = look(tokenizer, vocabulary_of(tokenizer))
    assert np.isfinite(result.detections[CUT].score).all()  # all answers are longer
    assert any(text.startswith("140 of 140 answers have more than 16 tokens") for text in result.sentences())
