"""Tiny models and samples for the tests: seeded, no network, nothing to download."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    FalconConfig,
    FalconForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2PreTrainedModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

Config = TypeVar("Config", bound=PretrainedConfig)
Model = TypeVar("Model", bound=PreTrainedModel)

PAD = 0
EOS = 59
# HF's 0.02 makes a model this small almost constant: no curvature, and D would test nothing.
WEIGHT_SCALE = 0.3
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": WEIGHT_SCALE,
    "pad_token_id": PAD,
}
"""As most families name them."""


def tiny_bert(
    num_labels: int = 3,
    layers: int = 2,
    hidden: int = 16,
    intermediate: int = 32,
    vocab: int = 60,
    dtype: torch.dtype = torch.float64,
    problem_type: str | None = None,
    *,
    seed: int = 0,
) -> BertForSequenceClassification:
    """An encoder with a classification head (classifier.weight, classifier.bias), in train mode.

    Dropout is 0.1 everywhere, so that the code under test must deal with it.  Biases and
    norms are perturbed away from 0 and 1, where mistakes would not show.
    """
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate, "vocab_size": vocab}
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 0.1)
    of_head = {"num_labels": num_labels, "problem_type": problem_type}
    config = BertConfig(**SIZES | sizes, **rates, **of_head, attn_implementation="sdpa")
    return _built(BertForSequenceClassification, config, dtype, seed)


def tiny_llama_classifier(
    *, hidden: int = 16, intermediate: int = 32, vocab: int = 60, dtype: torch.dtype = torch.float64, seed: int = 0
) -> LlamaForSequenceClassification:
    """A decoder with a classification head (score.weight, no bias), in train mode.

    k and v are narrower than q, so target layers differ in shape.  Attention dropout is 0.1.
    Its norms and rotary angles compute in float32 whatever `dtype` is: expect 1e-6, not 1e-12.
    """
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "vocab_size": vocab, "num_key_value_heads": 1}
    further = {"attention_dropout": 0.1, "num_labels": 3, "use_cache": False, "attn_implementation": "sdpa"}
    return _built(LlamaForSequenceClassification, LlamaConfig(**SIZES | sizes | further), dtype, seed)


def tiny_gpt2(seed: int = 0) -> GPT2ForSequenceClassification:
    """A decoder whose linear layers are transformers' Conv1D (weight i × o), with a head (score.weight)."""
    config = GPT2Config(**SIZES, n_inner=32, bos_token_id=EOS, eos_token_id=EOS, num_labels=3, use_cache=False)
    return _built(GPT2ForSequenceClassification, config, seed=seed)


def tiny_falcon() -> FalconForSequenceClassification:
    """A decoder whose linear layers are a subclass of nn.Linear with another forward, with a head (score.weight)."""
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    special = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD, "use_cache": False}
    config = FalconConfig(**sizes, **special, hidden_dropout=0.0, attention_dropout=0.0)
    return _built(FalconForSequenceClassification, config)


def tiny_t5(seed: int = 0) -> T5ForSequenceClassification:
    """An encoder and decoder that share one Embedding, with RMS norms; rows must end in EOS.

    Its norms compute in float32: expect 1e-6.
    """
    sizes = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "num_labels": 3}
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD, "use_cache": False}
    return _built(T5ForSequenceClassification, T5Config(**sizes, **special, feed_forward_proj="gated-gelu"), seed=seed)


def tiny_mpnet(seed: int = 0) -> MPNetForSequenceClassification:
    """An encoder with a two-layer head (classifier.dense, classifier.out_proj)."""
    return _built(MPNetForSequenceClassification, MPNetConfig(**SIZES, num_labels=3), seed=seed)


def tiny_bart() -> BartForSequenceClassification:
    """An encoder and decoder with a head of two layers (classification_head); rows must end in EOS."""
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 32}.items()
    }
    sizes = {"vocab_size": 60, "d_model": 16, "max_position_embeddings": 64, "init_std": WEIGHT_SCALE, "num_labels": 3}
    special = {"pad_token_id": PAD, "bos_token_id": EOS - 1, "eos_token_id": EOS, "decoder_start_token_id": EOS}
    config = BartConfig(**sizes, **sides, **special, forced_eos_token_id=None, use_cache=False)
    return _built(BartForSequenceClassification, config)


def tiny_vit() -> ViTForImageClassification:
    """An image model: pixel_values of 3 × 8 × 8 in four patches, with a head (classifier)."""
    return _built(ViTForImageClassification, ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=3))


def generating(kind: type[Model], like: PreTrainedModel, dtype: torch.dtype = torch.float64, **options: Any) -> Model:
    """A model that generates text, of a tiny classifier's sizes."""
    settings = like.config.to_dict() | options
    for name in ("num_labels", "id2label", "label2id", "architectures", "problem_type"):
        settings.pop(name, None)
    return _built(kind, type(like.config)(**settings), dtype)


def tiny_encoder_decoder() -> EncoderDecoderModel:
    """Two encoders, one of which writes; rows must end in EOS."""
    one, other = (BertConfig(**tiny_bert(layers=1).config.to_dict()) for _ in range(2))
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        one, other, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=EOS
    )
    return _built(EncoderDecoderModel, config)


GENERATORS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: generating(LlamaForCausalLM, tiny_llama_classifier(), tie_word_embeddings=False),
    "llama, tied": lambda: generating(LlamaForCausalLM, tiny_llama_classifier(), tie_word_embeddings=True),
    "gpt2": lambda: generating(GPT2LMHeadModel, tiny_gpt2()),
    "t5": lambda: generating(T5ForConditionalGeneration, tiny_t5()),
    "bart": lambda: generating(BartForConditionalGeneration, tiny_bart()),
    "bert + bert": tiny_encoder_decoder,
}
"""Families of models that generate text; the last three have an encoder."""


def lora(
    model: PreTrainedModel,
    r: int = 4,
    targets: Sequence[str] | str | None = None,
    modules_to_save: Sequence[str] | None = None,
    dropout: float = 0.1,
    alpha: int = 8,
    *,
    task: TaskType = TaskType.SEQ_CLS,
    seed: int = 0,
    bias: Literal["none", "all", "lora_only"] = "none",
) -> PeftModel:
    """`model` with LoRA put into it (in place), B small but not zero so that A has a gradient.

    `targets` None is "all-linear": every linear layer but the classification head, with
    BERT's pooler among them.  `modules_to_save` None lets PEFT train the head (classifier,
    score) as SEQ_CLS does.
    """
    config = LoraConfig(
        task_type=task,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias=bias,
        target_modules=_as_list(targets) if targets is not None else "all-linear",
        fan_in_fan_out=isinstance(model, GPT2PreTrainedModel),
        modules_to_save=_as_list(modules_to_save),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return adapted


def samples(
    n: int,
    num_labels: int,
    vocab: int = 60,
    lengths: tuple[int, int] = (4, 12),
    seed: int = 0,
    regression: bool = False,
) -> list[dict[str, Any]]:
    """n rows of input_ids, attention_mask (lists of ints) and labels (an int, a float for regression).

    Lengths are drawn from `lengths`, both ends included; token 0 is kept for padding.  Each
    class occurs where n >= num_labels; the rest are drawn at random, so frequencies differ.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = lengths
    sizes = torch.randint(low, high + 1, (n,), generator=generator).tolist()
    drawn = torch.randint(num_labels, (n,), generator=generator)
    drawn[: min(n, num_labels)] = torch.arange(num_labels)[:n]
    classes = drawn[torch.randperm(n, generator=generator)].tolist()
    values = torch.randn(n, generator=generator).tolist()
    return [
        {
            "input_ids": torch.randint(1, vocab, (size,), generator=generator).tolist(),
            "attention_mask": [1] * size,
            "labels": value if regression else label,
        }
        for size, label, value in zip(sizes, classes, values, strict=True)
    ]


def texts(model: PreTrainedModel | PeftModel, n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """n rows of input_ids, attention_mask and labels whose target is what the model itself says, greedily.

    Of a decoder alone the target follows its prompt, whose labels are -100; else labels are a separate sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    behind_encoder = bool(model.config.is_encoder_decoder)
    rows = []
    for j in range(n):
        prompt = torch.randint(1, EOS - 1, (1, 3 + j % 4), generator=generator)
        prompt[0, -1] = EOS if behind_encoder else prompt[0, -1]
        start = model.config.decoder_start_token_id if behind_encoder else None
        sequence = torch.tensor([[start]]) if behind_encoder else prompt
        for _ in range(2 + j % 5):
            inputs = {"input_ids": prompt, "decoder_input_ids": sequence} if behind_encoder else {"input_ids": sequence}
            with torch.no_grad():
                logits = model.eval()(**inputs).logits[:, -1, 1:]
            sequence = torch.cat([sequence, 1 + logits.argmax(1, keepdim=True)], 1)
        whole = prompt[0].tolist() if behind_encoder else sequence[0].tolist()
        labels = sequence[0, 1:].tolist() if behind_encoder else [-100] * prompt.shape[1] + whole[prompt.shape[1] :]
        rows.append({"input_ids": whole, "attention_mask": [1] * len(whole), "labels": labels})
    model.train()
    return rows


def text_collator(model: PreTrainedModel | PeftModel, *, left: bool = False, pad: int = 0) -> Callable[..., Any]:
    """Batches of such rows, padded on one side by `pad` tokens more than they need."""
    behind_encoder = bool(model.config.is_encoder_decoder)

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        width = max(map(len, rows)) + pad
        fills = [[fill] * (width - len(row)) for row in rows]
        return torch.tensor([f + row if left else row + f for row, f in zip(rows, fills, strict=True)])

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        fills = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
        batch = {name: padded([row[name] for row in rows], fill) for name, fill in fills.items()}
        if behind_encoder:
            base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
            batch["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return batch

    return collate


def images(n: int, num_labels: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """n rows of pixel_values (3 × 8 × 8, float64) and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"pixel_values": torch.randn(3, 8, 8, generator=generator, dtype=torch.float64), "labels": j % num_labels}
        for j in range(n)
    ]


def collate(
    samples: Sequence[dict[str, Any]], pad_to: int | None = None, *, label_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """A batch padded on the right to `pad_to`, by default to the longest row.

    input_ids and attention_mask are (n, t) int64; labels (n,) are int64 for ints and
    float32 for floats, or `label_dtype`.  Raises ValueError where a row is longer than `pad_to`.
    Rows of pixel_values are stacked.
    """
    labels = torch.tensor([sample["labels"] for sample in samples], dtype=label_dtype)
    if "pixel_values" in samples[0]:
        return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples]), "labels": labels}
    longest = max(len(sample["input_ids"]) for sample in samples)
    width = longest if pad_to is None else pad_to
    if longest > width:
        raise ValueError(f"a row has {longest} tokens, more than pad_to={width}")

    def padded(key: str, fill: int) -> Tensor:
        rows = [sample[key] + [fill] * (width - len(sample[key])) for sample in samples]
        return torch.tensor(rows, dtype=torch.int64)

    return {"input_ids": padded("input_ids", PAD), "attention_mask": padded("attention_mask", 0), "labels": labels}


def _built(kind: Callable[[Config], Model], config: Config, dtype: torch.dtype = torch.float64, seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).train()


def _as_list(names: Iterable[str] | str | None) -> list[str] | str | None:
    return names if isinstance(names, str) or names is None else list(names)
