"""What trainings that take seconds need: a tiny checkpoint, rows whose words decide the label, and settings."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

Row = dict[str, Any]

GOOD = ("good", "fine", "warm", "glad", "sunny", "kind")
BAD = ("bad", "poor", "cold", "sad", "rainy", "mean")
PLAIN = ("the", "day", "was", "a", "and", "it", "house", "tree", "river", "stone")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def bert(*, vocab: int, layers: int = 2, hidden: int = 16, labels: int = 3) -> BertForSequenceClassification:
    """A BERT whose weights are large enough that a model this small has curvature."""
    config = BertConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        initializer_range=0.3,
        classifier_dropout=0.1,
        num_labels=labels,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def save_checkpoint(folder: Path) -> Path:
    """A BERT of two layers without a head, whose features tell the moods, and a tokenizer of whole words."""
    vocab = {word: j for j, word in enumerate([*SPECIAL, *GOOD, *BAD, *PLAIN])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    model = bert(vocab=len(vocab)).bert
    mood = torch.linspace(-1, 1, model.config.hidden_size)
    with torch.no_grad():  # as pretraining has it: words of one mood are alike
        for words, sign in ((GOOD, 1), (BAD, -1)):
            model.embeddings.word_embeddings.weight[[vocab[word] for word in words]] += sign * mood
    model.save_pretrained(folder)
    return folder


def make_rows(n: int, seed: int = 0, labels: Sequence[Any] = (0, 1), plain: tuple[int, int] = (2, 6)) -> list[Row]:
    """Sentences with three words of one mood among so many plain ones; the mood is the label."""
    rng = random.Random(seed)
    rows = []
    for j in range(n):
        words = rng.sample((BAD, GOOD)[j % 2], 3) + rng.choices(PLAIN, k=rng.randint(*plain))
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": labels[j % 2]})
    return rows


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_config(path: Path, model: Path, data: Path, **sections: Mapping[str, Any]) -> Path:
    """A YAML file; `sections` are laid over settings with which the tiny model learns in seconds."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"path": str(model)},
        "data": {"train": str(data)},
        "quality": {"fraction": 0.5},
        "ranks": {"policy": "tsqlora", "mean": 2.0, "interval": 4},
        "adapter": {"alpha": 4.0},
        "training": {"epochs": 6, "batch_size": 8, "learning_rate": 0.02, "bf16": False, "logging_strategy": "no"},
    }
    for name, section in sections.items():
        settings[name] = settings.get(name, {}) | dict(section)
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path
