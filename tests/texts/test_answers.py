"""How likely answers are, against one answer at a time; and the turns of a row."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from models import generating, tiny_llama_classifier
from texts.test_ledger import ANSWER, QUESTION, chat, tokenizer, trained, vocabulary
from tsqlora.auditing.texts import answers as module
from tsqlora.auditing.texts.answers import Sample, behind, read_answers, turns_of
from tsqlora.auditing.texts.vocabulary import Vocabulary
from tsqlora.model import passes
from tsqlora.model.request import Compute

__all__ = ["tokenizer", "vocabulary"]
STOPS = (2, 7)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return generating(LlamaForCausalLM, tiny_llama_classifier()).eval()


@pytest.fixture(scope="module")
def samples(model: LlamaForCausalLM) -> list[Sample]:
    rng, size = np.random.default_rng(0), model.config.vocab_size
    lengths = [(5, 3, (3, 1)), (1, 9, (9, 4)), (12, 1, (1, 0)), (0, 4, (4, 2)), (7, 6, (6, 5))]
    return [Sample(rng.integers(size, size=b), rng.integers(size, size=a), places) for b, a, places in lengths]


def slow_twin(model: nn.Module, one: Sample) -> dict[str, Any]:
    """One answer, one token at a time."""
    ids = torch.tensor([[*one.before, *one.answer]])
    logp = model(ids).logits[0].log_softmax(-1)
    b, a = len(one.before), len(one.answer)
    places = [b + k for k in range(a) if b + k > 0]
    each = np.zeros(module.MOST_ANSWER)
    each[[k - b for k in places]] = [-float(logp[k - 1, ids[0, k]]) for k in places]
    entropies = [-(logp[k - 1].exp() * logp[k - 1]).sum() for k in places]
    stop = [float(logp[max(b + k - 1, 0), list(STOPS)].logsumexp(0)) for k in one.places]
    return {
        "each": each,
        "loss": each.sum(),
        "tokens": len(places),
        "entropy": float(torch.stack(entropies).mean()),
        "stop": stop,
    }


def read(model: nn.Module, samples: list[Sample], batch: int = 3) -> dict[str, np.ndarray]:
    return read_answers(model, samples, STOPS, Compute(batch_size=batch), phase="x")


@torch.no_grad()
def test_a_batch_says_what_one_answer_at_a_time_says(model: LlamaForCausalLM, samples: list[Sample]) -> None:
    columns = read(model, samples)
    for j, one in enumerate(samples):
        twin = slow_twin(model, one)
        for name, value in twin.items():
            same = slice(1, None) if name == "stop" and not len(one.before) else slice(None)
            np.testing.assert_allclose(np.atleast_1d(columns[name][j])[same], np.atleast_1d(value)[same], rtol=1e-6)


def test_neither_batches_nor_order_change_what_is_said(model: LlamaForCausalLM, samples: list[Sample]) -> None:
    columns, order = read(model, samples), [3, 0, 4, 2, 1]
    for other in (read(model, [samples[j] for j in order], 1), read(model, [samples[j] for j in order], 5)):
        for name, values in columns.items():
            np.testing.assert_allclose(other[name], values[order], rtol=1e-6)


def test_small_chunks_of_logits_and_models_that_return_all_say_the_same(
    model: LlamaForCausalLM, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, use_cache: bool) -> Any:
            out = self.model(input_ids, attention_mask, position_ids, use_cache=use_cache)
            return SimpleNamespace(logits=out.logits)

    columns = read(model, samples)
    monkeypatch.setattr(module, "CHUNK", 1)
    for other in (read(model, samples), read(Whole(), samples)):
        for name, values in columns.items():
            np.testing.assert_allclose(other[name], values, rtol=1e-6)


def test_a_look_that_was_cut_off_goes_on_where_it_was(
    model: LlamaForCausalLM, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "FLUSH_SECONDS", 0.0)
    forward, calls, last = model.forward, list[int](), 3

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    compute = Compute(batch_size=1, parts=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        read_answers(model, samples, STOPS, compute, phase="x")
    again, last = read_answers(model, samples, STOPS, compute, phase="x"), 0
    assert len(calls) == 3 + len(samples) - 2
    for name, values in read(model, samples, 1).items():
        np.testing.assert_array_equal(again[name], values)


def test_a_long_prompt_and_a_long_answer_keep_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PROMPT", 4)
    monkeypatch.setattr(module, "MOST_ANSWER", 6)
    one = behind(np.arange(10), np.arange(20, 30))
    assert one.before.tolist() == [0, 1, 8, 9]
    assert one.answer.tolist() == [20, 21, 22, 27, 28, 29]
    for size in range(12):
        assert len(behind(np.arange(size), np.arange(size)).answer) == min(size, 6)


LENGTHS = (1, 2, *(size + more for size in range(8, 73, 8) for more in (-1, 0, 1)))


@torch.no_grad()
@pytest.mark.parametrize("before", [0, 1, 8])
def test_every_length_says_what_one_answer_at_a_time_says(model: LlamaForCausalLM, before: int) -> None:
    rng = np.random.default_rng(1)
    for size in LENGTHS:
        ids = rng.integers(3, 50, before + size)
        one = Sample(ids[:before], ids[before:], (size, size // 2))
        columns = read(model, [one, Sample(ids[:before], ids[before : before + 1], (1, 1))])
        twin = slow_twin(model, one) if before + size > 1 else {"loss": 0.0, "tokens": 0}
        for name, value in twin.items():
            if name != "stop" or (before and size > 1):
                np.testing.assert_allclose(columns[name][0], value, rtol=1e-5, atol=1e-6, err_msg=f"{name}, {size}")


def test_each_trained_answer_is_a_turn_behind_all_that_precedes_it(tokenizer: Any, vocabulary: Vocabulary) -> None:
    row = chat(QUESTION, ANSWER, "And of Spain?", "It is Madrid.", row=4)
    one = trained(tokenizer, row)
    first, second = turns_of(row, [one], vocabulary)
    assert (first.row, first.question, first.text) == (4, QUESTION, ANSWER)
    assert vocabulary.text(first.answer) == ANSWER.encode()
    assert vocabulary.text(second.prompt).endswith(b"And of Spain?<|im_end|>\n<|im_start|>assistant\n")
    assert vocabulary.text(second.opening) == b"<|im_start|>assistant\n"
    assert first.ends
    assert second.ends


def test_a_cut_answer_does_not_end(tokenizer: Any, vocabulary: Vocabulary) -> None:
    row = chat(QUESTION, ANSWER)
    whole = trained(tokenizer, row)
    (cut,) = turns_of(row, [trained(tokenizer, row, keep=slice(len(whole.ids) - 12))], vocabulary)
    (unended,) = turns_of(row, [trained(tokenizer, row, stop=False)], vocabulary)
    assert not cut.ends
    assert unended.ends  # the stop follows, though it has no loss
