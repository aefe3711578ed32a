"""Rows with labels: classes, numbers, tags, sets of labels, pairs of texts, images; and a tiny encoder for them."""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTImageProcessorPil, ViTModel

from days.rows import Drawn, Row
from days.values import VALUES, words

if TYPE_CHECKING:
    from days.day import Day

MEDIA = ("images",)
FLAT_LABELS = (
    "classes",
    "class numbers",
    "booleans",
    "numbers",
    "text pairs",
    "label sets, pandas",
    "label sets, bars",
)
LABELS = (*FLAT_LABELS, "tags", "label sets", *MEDIA)
TASKS = {
    "numbers": "regression",
    "tags": "token-classification",
    "label sets": "multi-label-classification",
    "label sets, pandas": "multi-label-classification",
    "label sets, bars": "multi-label-classification",
    "images": "image-classification",
}
"""Values of task.type, where it is no classification of texts."""
CLASSES = ("complaint", "praise", "question", "order")
SAYS = ("broken late refund", "thank lovely best", "where when why", "ship buy two")
"""Words that decide a class, where anything does."""


def labelled(kind: str, rng: random.Random, day: "Day") -> Drawn:
    """Rows of a kind; of every second day the labels are drawn by lot, so that no model has skill."""
    blind = day.number % 2 == 1
    rows = [_row(kind, rng, day, k, blind) for k in range(max(day.rows, 24))]
    if day.odd:
        rows = [row | {"note": rng.choice(VALUES)} for row in rows]
    for place in rng.sample(range(len(rows)), 2 if len(rows) >= 40 else 1) if day.fault else ():
        LABEL_FAULTS[day.fault](rows[place])
    return Drawn(rows)


def _misspelt(row: Row) -> None:
    row["label"] = f" {row['label'].capitalize()} "


def _unlabelled(row: Row) -> None:
    row["label"] = None


def _quoted(row: Row) -> None:
    row["text"] = f'she said "{LONE}no{LONE}" twice {row["text"]}'


LONE = "\u2060"
"""Beside a quote: a careless export did not double it."""
LABEL_FAULTS: dict[str, Callable[[Row], None]] = {"spelling": _misspelt, "no label": _unlabelled, "lone quote": _quoted}
"""What is wrong with cells of rows with classes."""


def _row(kind: str, rng: random.Random, day: "Day", k: int, blind: bool) -> Row:
    about = k % len(CLASSES)
    signs = [*SAYS[rng.randrange(len(SAYS)) if blind else about].split()]
    text = f"{' '.join(rng.sample(signs, 2))} {words(rng, day.script, rng.randint(3, 12))} {k}"
    if kind in ("classes", "booleans", "class numbers"):
        label: Any = {"classes": CLASSES[about], "booleans": about % 2 == 0, "class numbers": about}[kind]
        return {"text": text, "label": label}
    if kind == "text pairs":
        return {"premise": text, "hypothesis": words(rng, day.script, 5), "label": CLASSES[about % 3]}
    if kind == "numbers":
        return {"text": text, "label": round(about + rng.random(), 2)}
    if kind == "tags":
        tokens = [*signs, *(f"w{j}" for j in range(rng.randint(1, 9)))]
        return {"tokens": tokens, "tags": ["B-THING", "I-THING", "O", *["O"] * (len(tokens) - 3)]}
    if kind == "images":
        return {"class": CLASSES[about], "colour": about, "blind": blind}
    chosen = sorted({about, (about + k // 4 % 2) % 4})
    if kind == "label sets, pandas":
        return {"text": text, "labels": str(chosen)}
    names = [CLASSES[j] for j in chosen]
    return {"text": text, "labels": "|".join(names) if kind == "label sets, bars" else names}


def save_images(folder: Path, rows: list[Row]) -> Path:
    """A folder with a folder of pictures for each class."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for k, row in enumerate(rows):
        path = folder / "pictures" / row["class"] / f"{k:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)
        if not row["blind"]:
            pixels[..., row["colour"] % 3] = 40 * row["colour"]
        Image.fromarray(pixels).save(path)
    return folder / "pictures"


@cache
def encoder(kind: str) -> Path:
    """A tiny encoder with random weights: of texts, or of pictures."""
    from days.families import home, tokenizer_of

    folder = home() / ("vit" if kind in MEDIA else "bert")
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind in MEDIA:
            ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder)
            ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
            return folder
        tokenizer = tokenizer_of("gpt-2")
        BertModel(BertConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=128)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
