"""The last linear layer and what it is given, in heads of transformers' families."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

import tsqlora as tsq
from models import collate
from tsqlora.quality.forward_pass import features_of, find_head, recorded

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 3}
TEXT = SMALL | {"vocab_size": 60, "pad_token_id": 0}
ROWS = [
    {"input_ids": [*range(5, 9 + 3 * j), 1], "attention_mask": [1] * (5 + 3 * j), "labels": j % 3} for j in range(4)
]

FAMILIES: dict[str, tuple[Callable[[], nn.Module], str, str | None]] = {
    "bert": (lambda: BertForSequenceClassification(BertConfig(**TEXT)), "classifier", "tanh"),
    "roberta": (lambda: RobertaForSequenceClassification(RobertaConfig(**TEXT)), "classifier.out_proj", "tanh"),
    "mpnet": (lambda: MPNetForSequenceClassification(MPNetConfig(**TEXT)), "classifier.out_proj", "tanh"),
    "deberta": (lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**TEXT)), "classifier", "gelu"),
    "distilbert": (
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=60, num_labels=3)
        ),
        "classifier",
        "relu",
    ),
    "gpt2": (
        lambda: GPT2ForSequenceClassification(
            GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=60, pad_token_id=0, num_labels=3)
        ),
        "score",
        None,
    ),
    "llama": (lambda: LlamaForSequenceClassification(LlamaConfig(**TEXT)), "score", None),
    "t5": (
        lambda: T5ForSequenceClassification(
            T5Config(
                decoder_start_token_id=0,
                d_model=16,
                d_kv=8,
                d_ff=16,
                num_layers=1,
                num_heads=2,
                vocab_size=60,
                num_labels=3,
            )
        ),
        "classification_head.out_proj",
        "tanh",
    ),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4)), "classifier", None),
    "wav2vec2": (
        lambda: Wav2Vec2ForSequenceClassification(
            Wav2Vec2Config(
                **SMALL,
                conv_dim=(8,),
                conv_kernel=(4,),
                conv_stride=(4,),
                num_feat_extract_layers=1,
                classifier_proj_size=16,
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
            )
        ),
        "classifier",
        None,
    ),
}


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
    make, name, activation = FAMILIES[family]
    model = make().eval()
    model = tsq.wrap(model, mean_rank=2).eval() if wrapped else model
    inputs = inputs_of(family)

    def forward() -> torch.Tensor:
        return model(**inputs).logits

    head = find_head(model, forward)
    assert head is not None
    assert name in head.name.replace(".modules_to_save.default", "")
    with torch.no_grad(), recorded([head.linear]) as seen:
        logits = forward()
    torch.testing.assert_close(head.linear(features_of(seen, head.linear, logits)), logits)
    if activation is not None:
        # A pooler that was loaded belongs to the body, and LoRA adapts it; made from a config it is as new as the head.
        assert wrapped or (head.dense is not None and head.activation == activation)


def test_padding_moves_no_feature() -> None:
    torch.manual_seed(0)
    model = FAMILIES["llama"][0]().eval()
    features = []
    for width in (14, 20):
        batch = collate(ROWS, pad_to=width)
        batch.pop("labels")
        head = find_head(model, lambda batch=batch: model(**batch).logits)
        assert head is not None
        with torch.no_grad(), recorded([head.linear]) as seen:
            logits = model(**batch).logits
        features.append(features_of(seen, head.linear, logits))
    torch.testing.assert_close(*features)


def test_no_hook_stays_also_after_an_error() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), recorded([layer]):
        layer(torch.zeros(1, 3))
    assert not layer._forward_hooks


def test_a_frozen_head_is_none() -> None:
    model = FAMILIES["bert"][0]().eval().requires_grad_(False)
    batch = inputs_of("bert")
    assert find_head(model, lambda: model(**batch).logits) is None
