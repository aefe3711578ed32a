"""The last linear layer and what it is given, in heads of transformers' families."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DynamicCache,
    Gemma3Config,
    Gemma3ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import tsqlora as tsq
from models import (
    GENERATORS,
    collate,
    images,
    lora,
    samples,
    text_collator,
    texts,
    tiny_bert,
    tiny_gpt2,
    tiny_llama_classifier,
    tiny_vit,
)
from tsqlora.model.forward import Forward, Head, find_head, forward_pass, pooled, recorded
from tsqlora.model.request import Compute
from tsqlora.tasks import get_task, task_of

CLASSES, NUMBERS = get_task("sequence-classification"), get_task("regression")

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 3}
TEXT = SMALL | {"vocab_size": 60, "pad_token_id": 0}
ROWS = [
    {"input_ids": [*range(5, 9 + 3 * j), 1], "attention_mask": [1] * (5 + 3 * j), "labels": j % 3} for j in range(4)
]

FAMILIES: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "bert": (TEXT, "classifier", "tanh"),
    "roberta": (TEXT, "classifier.out_proj", "tanh"),
    "mpnet": (TEXT, "classifier.out_proj", "tanh"),
    "deberta-v2": (TEXT, "classifier", "gelu"),
    "distilbert": (
        {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 60, "num_labels": 3},
        "classifier",
        "relu",
    ),
    "gpt2": (
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 60, "pad_token_id": 0, "num_labels": 3},
        "score",
        None,
    ),
    "llama": (TEXT, "score", None),
    "t5": (
        {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 60, "num_labels": 3}
        | {"decoder_start_token_id": 0},
        "classification_head.out_proj",
        "tanh",
    ),
    "vit": (SMALL | {"image_size": 8, "patch_size": 4}, "classifier", None),
    "wav2vec2": (
        SMALL
        | {"conv_dim": (8,), "conv_kernel": (4,), "conv_stride": (4,), "num_feat_extract_layers": 1}
        | {"classifier_proj_size": 16, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        "classifier",
        None,
    ),
}
"""Sizes by the name that transformers has for a family, the head's name, and the activation before it."""
OTHERS: dict[str, Any] = {"vit": AutoModelForImageClassification, "wav2vec2": AutoModelForAudioClassification}


def build(family: str) -> Any:
    config = AutoConfig.for_model(family, **FAMILIES[family][0])
    return OTHERS.get(family, AutoModelForSequenceClassification).from_config(config)


def passed(*arguments: Any, **options: Any) -> tuple[Forward, Head]:
    """What a forward pass finds where the model has a head."""
    forward, head = forward_pass(*arguments, **options)
    assert forward is not None
    assert head is not None
    return forward, head


def head_of(model: nn.Module, inputs: dict[str, Tensor]) -> Head:
    head = find_head(model, inputs, CLASSES)
    assert head is not None
    return head


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    if family == "vit":
        return {"pixel_values": torch.randn(4, 3, 8, 8)}
    if family == "wav2vec2":
        return {"input_values": torch.randn(4, 64)}
    return {name: values for name, values in collate(ROWS).items() if name != "labels"}


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_found_and_its_features_make_the_logits(family: str, wrapped: bool) -> None:
    torch.manual_seed(0)
    _, name, activation = FAMILIES[family]
    model = build(family).eval()
    model = tsq.wrap(model, mean_rank=2).eval() if wrapped else model
    inputs = inputs_of(family)
    head = head_of(model, inputs)
    assert name in head.name.replace(".modules_to_save.default", "")
    with torch.no_grad(), recorded([head.linear]) as seen:
        logits = model(**inputs).logits
    torch.testing.assert_close(head.linear(pooled(seen[head.linear][0], model, inputs)), logits)
    if activation is not None:
        # A pooler that was loaded belongs to the body, and LoRA adapts it; made from a config it is as new as the head.
        assert wrapped or (head.dense is not None and head.activation == activation)


def test_a_pooler_that_was_trained_is_not_whitened() -> None:
    model = build("bert").eval()
    new = head_of(model, inputs_of("bert"))
    torch.nn.init.normal_(model.bert.pooler.dense.bias)
    trained = head_of(model, inputs_of("bert"))
    assert (new.dense is None, trained.dense is None) == (False, True)


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_layer_without_bias_is_not_whitened_as_its_centre_would_be_lost(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2)).eval()
    assert (head_of(model, {"input": torch.randn(3, 6)}).dense is not None) == bias


def test_padding_moves_no_feature() -> None:
    torch.manual_seed(0)
    model = build("llama").eval()
    features = []
    for width in (14, 20):
        batch = collate(ROWS, pad_to=width)
        batch.pop("labels")
        head = head_of(model, batch)
        with torch.no_grad(), recorded([head.linear]) as seen:
            model(**batch)
        features.append(pooled(seen[head.linear][0], model, batch))
    torch.testing.assert_close(*features)


def test_no_hook_stays_also_after_an_error() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), recorded([layer]):
        layer(torch.zeros(1, 3))
    assert not layer._forward_hooks


def test_a_frozen_head_is_none() -> None:
    model = build("bert").eval().requires_grad_(False)
    batch = inputs_of("bert")
    assert find_head(model, batch, CLASSES) is None


class Reads:
    """Rows that count how often each is read, and draw random numbers, as augmentation does."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.reads = rows, [0] * len(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, j: int) -> dict[str, Any]:
        torch.rand(1)
        np.random.rand()
        self.reads[j] += 1
        return self.rows[j]


@pytest.mark.parametrize("kind", ["classes", "images", "text"])
def test_a_row_is_read_once(kind: str) -> None:
    if kind == "text":
        model = GENERATORS["llama"]()
        rows, collator = texts(model, 13), text_collator(model)
    else:
        model = tiny_bert() if kind == "classes" else tiny_vit()
        rows, collator = (samples if kind == "classes" else images)(13, 3), collate
    reads, before = Reads(rows), (torch.get_rng_state(), np.random.get_state()[1].tolist())
    forward_pass(model, reads, collator, task=task_of(model), compute=Compute(4), mean=True)
    assert reads.reads == [1] * 13
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


def test_workers_read_the_same_rows() -> None:
    model, rows, before = tiny_bert(), samples(13, 3), torch.get_rng_state()
    alone, _ = passed(model, rows, collate, task=CLASSES, compute=Compute(4))
    reads = Reads(rows)
    ahead, _ = passed(model, reads, collate, task=CLASSES, compute=Compute(4, workers=2))
    np.testing.assert_array_equal(alone.logits, ahead.logits)
    assert sum(reads.reads) == 4, "the first batch finds the head; the workers read the others"
    assert torch.equal(before, torch.get_rng_state())


def test_rows_are_read_again_where_memory_was_short_and_only_there() -> None:
    model, rows = tiny_bert(), samples(13, 3)
    whole, _ = passed(model, rows, collate, task=CLASSES, compute=Compute(6))

    def short(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        if len(batch) > 3:
            raise MemoryError
        return collate(batch)

    reads = Reads(rows)
    parts, _ = passed(model, reads, short, task=CLASSES, compute=Compute(6))
    np.testing.assert_allclose(parts.logits, whole.logits, atol=1e-6)
    assert sorted(reads.reads)[:7] == [1] * 7, "the batches after the first are read in the smaller parts"


def test_only_layers_that_may_be_the_head_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(tiny_llama_classifier(dtype=torch.float32)).eval()
    hooked: list[str] = []

    def note(*_: Any) -> None:
        hooked.extend(name for name, module in model.named_modules() if module._forward_hooks)

    model.register_forward_pre_hook(note)
    assert find_head(model, inputs_of("llama"), CLASSES) is not None
    assert len(hooked) == 1
    assert "score" in hooked[0]
    entire = build("llama").eval()
    linears = [module for module in entire.modules() if isinstance(module, nn.Linear)]
    with recorded(linears) as calls:
        entire(**inputs_of("llama"))
    assert len(calls) == 1


def tiny_gemma() -> Gemma3ForSequenceClassification:
    """A classifier whose padding token is that of the text in its config."""
    text = TEXT | {"head_dim": 8, "num_key_value_heads": 1, "sliding_window": 8, "num_labels": 3}
    vision = SMALL | {"image_size": 8, "patch_size": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, num_labels=3, mm_tokens_per_image=1)
    config.pad_token_id = None
    return Gemma3ForSequenceClassification(config)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("case", ["one output, bfloat16", "zero head"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_decoders_features_are_those_of_its_last_token(family: str, case: str, left: bool) -> None:
    torch.manual_seed(0)
    makes = {"llama": tiny_llama_classifier, "gpt2": tiny_gpt2, "gemma": tiny_gemma}
    model: Any = makes[family]().to(torch.float32)
    one, dtype = case.startswith("one"), torch.bfloat16 if case.startswith("one") else torch.float32
    if one:
        model.score, model.num_labels = nn.Linear(16, 1, bias=False), 1
    else:
        nn.init.zeros_(model.score.weight)
    model = model.to(dtype).eval()
    rows = samples(96, 3, regression=one)

    def collator(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        made = collate(batch)
        if left:
            for name in ("input_ids", "attention_mask"):
                width = made[name].shape[1]
                padded = [[0] * (width - len(row[name])) + row[name] for row in batch]
                made[name] = torch.tensor(padded)
        return made

    seen: list[Tensor] = []
    hook = model.score.register_forward_hook(lambda _, args, output: seen.append(args[0].detach()))
    batch = collator(rows)
    batch.pop("labels")
    with torch.no_grad():
        model(**batch)
    hook.remove()
    last = [max(t for t, token in enumerate(ids) if token != 0) for ids in batch["input_ids"].tolist()]
    slow = np.stack([seen[0][j, t].float().numpy() for j, t in enumerate(last)])
    task = NUMBERS if one else CLASSES
    forward, head = passed(model, rows, collator, task=task, compute=Compute(96))
    assert head.linear is model.score
    np.testing.assert_allclose(forward.features, slow, atol=0.1 if one else 1e-5)


def test_a_layer_whose_last_token_does_not_make_the_logits_is_no_head() -> None:
    class Mean(LlamaForSequenceClassification):
        def forward(self, input_ids: Tensor, **_: Any) -> dict[str, Tensor]:
            return {"logits": self.score(self.model(input_ids).last_hidden_state).mean(1)}

    model = Mean(LlamaConfig(**TEXT)).eval()
    assert find_head(model, inputs_of("llama"), CLASSES) is None


def test_a_layer_may_be_called_by_name() -> None:
    layer = nn.Linear(2, 3)
    with recorded([layer]) as seen:
        output = layer(input=torch.ones(1, 2))
    torch.testing.assert_close(seen[layer], (torch.ones(1, 2), output.detach()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert + bert", "llama classifier", "gemma classifier"])
def test_no_cache_is_built(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family in GENERATORS:
        model: Any = GENERATORS[family]()
        rows, collator = texts(model, 4), text_collator(model)
    else:
        model = (tiny_llama_classifier if "llama" in family else tiny_gemma)().float()
        rows, collator = samples(4, 3), collate
    for config in (model.config, model.config.get_text_config(), model.config.get_text_config(decoder=True)):
        config.use_cache = True
    monkeypatch.setattr(DynamicCache, "update", lambda *_, **__: pytest.fail("a cache"))
    forward_pass(model, rows, collator, task=task_of(model), compute=Compute(4), mean=True)


def test_float16_gives_finite_features() -> None:
    model, rows = tiny_bert(dtype=torch.float32), samples(13, 3)
    exact, _ = passed(model, rows, collate, task=CLASSES, compute=Compute(4), mean=True)
    half, _ = passed(model, rows, collate, task=CLASSES, compute=Compute(4, torch.float16), mean=True)
    for name in ("loss", "logits", "features", "mean"):
        one, other = getattr(exact, name), getattr(half, name)
        assert other.dtype == np.float32
        np.testing.assert_allclose(other, one, atol=0.05)
