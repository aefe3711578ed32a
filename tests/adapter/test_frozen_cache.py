"""Training with the cache of frozen blocks is training without it, but for rounding by padding."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    GenerationMixin,
)

import tsqlora as tsq
from models import SIZES, collate, samples
from stock import make_trainer
from tsqlora.adapter.frozen_cache import DECODERS, ENCODERS, FrozenCache

NAMES = {
    "n_layers": 3,
    "n_heads": 2,
    "dim": 16,
    "hidden_dim": 32,
    "n_layer": 3,
    "n_embd": 16,
    "n_head": 2,
    "n_inner": 32,
}
"""As DistilBERT and GPT-2 name their sizes."""
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def tiny(
    family: str, *, depth: int | None = 1, kind: Any = AutoModelForSequenceClassification, **more: Any
) -> PeftModel:
    """A model of three blocks without dropout."""
    torch.manual_seed(0)
    names = AutoConfig.for_model(family).to_dict()
    rates = {name: 0.0 for name, rate in names.items() if "drop" in name and isinstance(rate, float)}
    sizes = {**SIZES, "num_hidden_layers": 3, **NAMES, "num_key_value_heads": 1, "head_dim": 8, "embedding_size": 16}
    options = {name: value for name, value in sizes.items() if name in names} | rates | more
    config = AutoConfig.for_model(family, num_labels=3, bos_token_id=None, eos_token_id=None, **options)
    return tsq.wrap(kind.from_config(config), mean_rank=2, depth=depth)


def on_the_left(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch = collate(rows)
    for name in ("input_ids", "attention_mask"):
        for row, own in zip(batch[name], rows, strict=True):
            row.copy_(row.roll(len(row) - len(own["input_ids"])))
    return batch


def batches(*, text: bool, left: bool = False, prompt: int = 2) -> Iterator[dict[str, Any]]:
    """Shuffled batches of unequal length, of three epochs; the target of a text is all behind its prompt."""
    rows = samples(24, 3)
    for epoch in range(3):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(epoch)).tolist()
        for start in range(0, 24, 4):
            batch = (on_the_left if left else collate)([rows[j] for j in order[start : start + 4]])
            if text:
                batch["labels"] = batch["input_ids"].where(batch["attention_mask"].cumsum(1) > prompt, -100)
                batch["labels"][batch["attention_mask"] == 0] = -100
            yield batch


@contextmanager
def counted_calls(model: PeftModel) -> Iterator[list[None]]:
    """An entry for each pass through the lowest block's first layer."""
    calls: list[None] = []
    lowest = next(m for name, m in model.named_modules() if name.endswith(("layer.0", "layers.0", "h.0")))
    layer = next(m for m in lowest.modules() if [*m.parameters(recurse=False)])
    inner = layer.forward
    layer.forward = lambda *args: calls.append(None) or inner(*args)
    yield calls
    del layer.forward


def history(
    model: PeftModel, *, gb: float, half: bool = False, change: Callable[[int], Any] = lambda _: None, **options: Any
) -> tuple[list[torch.Tensor], FrozenCache, int]:
    """The loss and all gradients of each step, the cache, and the number of passes through the lowest block."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    text, steps = isinstance(model.get_base_model(), GenerationMixin), []
    with counted_calls(model) as calls, tsq.frozen_cache(model.train(), gb=gb) as cache:
        for number, batch in enumerate(batches(text=text, **options)):
            change(number)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(**batch).loss
            loss.backward()
            grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            steps.append(torch.cat([loss.detach()[None], *grads]))
            optimizer.step()
    return steps, cache, len(calls)


CASES = [
    *((family, "classes", False) for family in ENCODERS),
    *((family, task, left) for family in DECODERS for task in ("classes", "text") for left in (False, True)),
]


@pytest.mark.parametrize(("family", "task", "left"), CASES)
def test_losses_and_gradients_are_those_of_training_without_it(family: str, task: str, left: bool) -> None:
    make = partial(tiny, family, kind=AutoModelForCausalLM if task == "text" else AutoModelForSequenceClassification)
    expected, _, calls = history(make(), gb=0, left=left)
    assert calls == 18
    steps, cache, calls = history(make(), gb=0.01, left=left)
    torch.testing.assert_close(steps, expected, rtol=1e-3, atol=1e-5)
    assert not cache.notes
    assert calls == 18 - cache.skipped
    # Without rotary angles the places of a left-padded row follow the longest row of its batch.
    assert cache.skipped == 12 or (left and family == "gpt2")


def test_autocast_has_its_own_states() -> None:
    """Rows that a pass in float32 cached are computed again in bfloat16."""
    model = tiny("bert")
    expected, _, _ = history(copy.deepcopy(model), gb=0, half=True)

    def look(step: int) -> None:
        if step == 0:
            with torch.no_grad():
                model.eval()(**collate(samples(24, 3)))
            model.train()

    steps, cache, calls = history(model, gb=0.01, half=True, change=look)
    torch.testing.assert_close(steps, expected, rtol=0.1, atol=0.02)
    assert (cache.skipped, calls) == (12, 7)


def test_a_full_cache_serves_what_it_has_and_says_so_once() -> None:
    model = tiny("bert")
    expected, _, _ = history(copy.deepcopy(model), gb=0)
    rows = samples(24, 3)
    tokens = sum(len(row["input_ids"]) for row in rows)
    with pytest.warns(UserWarning, match="rows fill") as warned:
        steps, cache, calls = history(model, gb=(tokens - 1) * 16 * 4 / 2**30)
    torch.testing.assert_close(steps, expected, rtol=1e-3, atol=1e-5)
    assert len(warned) == len(cache.notes) == 1
    assert 0 < cache.skipped == 18 - calls < 12


@pytest.mark.parametrize(("family", "skipped"), [("roberta", 0), ("llama", 1)])
def test_positions_in_the_batch_are_part_of_a_row(family: str, skipped: int) -> None:
    """RoBERTa's own begin behind its padding index; of rotary angles only differences count."""
    model, batch = tiny(family).train(), collate(samples(4, 3))
    with tsq.frozen_cache(model, gb=0.01) as cache:
        model(**batch)
        model(**batch, position_ids=torch.arange(batch["input_ids"].shape[1])[None])
        assert cache.skipped == skipped
        model(**batch)
    assert cache.skipped == skipped + 1


def test_a_pass_in_evaluation_mode_before_the_first_step_fills_it() -> None:
    model = tiny("llama")

    def look(step: int) -> None:
        model.train(step > 0)

    _, cache, calls = history(model, gb=0.01, change=look)
    assert cache.skipped == 12
    assert calls == 6


@pytest.mark.parametrize(("gb", "calls"), [(0.0, 9), (0.01, 3)])
def test_it_works_in_a_stock_trainer_with_half_precision(gb: float, calls: int, tmp_path: Path) -> None:
    rows, model = samples(12, 3), tiny("mpnet")
    trainer = make_trainer(model, rows, tmp_path, [], num_train_epochs=3, per_device_train_batch_size=4, bf16=True)
    with counted_calls(model) as counted, tsq.frozen_cache(model, gb=gb) as cache:
        trainer.train()
    assert len(counted) == calls
    assert not cache.notes


def left_behind(model: nn.Module) -> list[str]:
    """Names of modules that have hooks or a replaced forward."""
    return [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)]


def test_nothing_stays_behind_also_after_an_error() -> None:
    model, batch = tiny("gpt2").train(), collate(samples(4, 3))
    base: Any = model.get_base_model()
    blocks = base.transformer.h

    def fail(*_: Any) -> None:
        raise ValueError("ours")

    with tsq.frozen_cache(model, gb=0.01) as cache:
        model(**batch)
        copy.deepcopy(model)(**batch)  # a copy is not served
        assert cache.skipped == 0
        with blocks[2].mlp.register_forward_pre_hook(fail), pytest.raises(ValueError, match="ours"):
            model(**batch)
        assert cache.skipped == 1
        assert not left_behind(blocks[0])
    assert not left_behind(model)


def checkpointing(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.get_base_model().gradient_checkpointing_enable()


def changed_weight(model: Any) -> None:
    with torch.no_grad():
        model.get_base_model().bert.encoder.layer[0].output.dense.weight.mul_(2)


def noise(model: Any) -> None:
    model.get_base_model().get_input_embeddings().register_forward_hook(lambda _, __, out: out + torch.rand_like(out))


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (partial(tiny, "bert", hidden_dropout_prob=0.1), {}, "hidden_dropout_prob"),
        (partial(tiny, "llama", attention_dropout=0.1), {}, "attention_dropout"),
        (partial(tiny, "bert", depth=None), {}, r"ranks\.depth"),
        (partial(tiny, "bert", output_hidden_states=True), {}, "output of every block"),
        (partial(tiny, "gemma"), {}, "GemmaFor"),
        (partial(tiny, "llama", rope_parameters=DYNAMIC), {}, "rotary"),
        (partial(tiny, "bert"), {"left": True}, "padding"),
        (partial(tiny, "gpt2", kind=AutoModelForCausalLM), {"left": True, "prompt": 0}, "padding"),
        (partial(tiny, "bert"), {"change": checkpointing}, "gradient checkpointing"),
        (partial(tiny, "bert"), {"change": changed_weight}, "weights changed"),
        (partial(tiny, "bert"), {"change": noise}, "hooks"),
    ],
)
def test_what_would_make_results_wrong_turns_it_off_with_the_reason(make: Any, options: Any, reason: str) -> None:
    """Steps are those without it, also if something changes in the second epoch."""
    steps: list[list[torch.Tensor]] = []
    for gb in (0, 0.01):
        model = make()
        torch.manual_seed(0)
        change = options.get("change", lambda _: None)
        later = {"change": lambda step, model=model, change=change: change(model) if step == 8 else None}
        with pytest.warns(UserWarning, match=reason) if gb else nullcontext():
            result, cache, _ = history(model, gb=gb, **options | later)
        assert len(cache.notes) == (gb > 0)
        steps.append(result)
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-3, atol=1e-5)


def test_heads_that_read_padding_are_not_served() -> None:
    model = tiny("bert", kind=AutoModelForQuestionAnswering)
    with pytest.warns(UserWarning, match="QuestionAnswering"), tsq.frozen_cache(model, gb=0.01):
        pass


def test_one_epoch_is_said_to_gain_nothing() -> None:
    model = tiny("bert").train()
    with pytest.warns(UserWarning, match="second epoch"), tsq.frozen_cache(model, gb=0.01):
        model(**collate(samples(4, 3)))
