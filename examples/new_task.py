"""A task of your own in one file: ordered grades, by a cumulative link; trained, measured, predicted as any other."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import tsqlora as tsq
from tsqlora.record import RunRecord
from tsqlora.rows.table import Table
from tsqlora.rows.write import write_rows
from tsqlora.tasks import TASKS
from tsqlora.tasks.reading import TEXTS
from tsqlora.tasks.task import Logits, evaluate
from tsqlora.training.predict import evaluate_run, predict_run

GRADES = 5
WORDS = ["[PAD]", "awful", "poor", "plain", "good", "superb", *(f"w{number}" for number in range(20))]


@dataclass(frozen=True)
class Ordinal:
    """Grades from 0 on: P(grade ≤ j) = σ(j + ½ − z), with z the model's only output (McCullagh, 1980)."""

    name = "ordinal"
    headline: ClassVar[str] = "accuracy"
    measured: ClassVar[tuple[str, ...]] = ("accuracy", "error", "loss")
    reading = replace(TEXTS, label=None, problem_type="regression")  # a text with a number; the head has one output
    link: ClassVar[Any] = "identity"  # one output a row: its head is fitted, and compared with a constant
    class_weights = None
    evaluate = evaluate

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        upper, lower = labels + 0.5 - logits[:, 0], labels - 0.5 - logits[:, 0]
        # log(σ(upper) − σ(lower)); the first and the last grade have no neighbour on one side.
        between = logsigmoid(upper) + logsigmoid(-lower) + np.log(1 - np.exp(-1))
        sides = torch.where(labels >= GRADES - 1, logsigmoid(-lower), between)
        return -torch.where(labels <= 0, logsigmoid(upper), sides)

    def batch_loss(self, losses: Tensor, labels: Tensor) -> Tensor:
        return losses.mean()

    def chance(self, labels: Tensor, width: int) -> Tensor:
        return self.offsets(labels.new_zeros(len(labels), 1), labels)

    def offsets(self, logits: Tensor, labels: Tensor) -> Tensor:
        shifts = torch.linspace(-GRADES, GRADES, 401).to(logits)
        return shifts[torch.stack([self.loss(logits + shift, labels).mean() for shift in shifts]).argmin()].reshape(1)

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        return logits[:, 0].round().clip(0, GRADES - 1)

    def unusable(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, str]:
        return (labels < 0) | (labels >= GRADES) | (labels % 1 != 0), f"grades are 0 to {GRADES - 1}"

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        predicted = self.predictions(logits)
        loss = self.loss(torch.from_numpy(logits), torch.from_numpy(labels)).mean()
        error = np.abs(predicted - labels).mean()
        return {"accuracy": float((predicted == labels).mean()), "error": float(error), "loss": float(loss)}

    def predict(self, table: Table, *, logits: Logits, **_: Any) -> list[dict[str, Any]]:
        return [{"prediction": int(grade)} for grade in self.predictions(logits(table)[0])]


TASKS[Ordinal.name] = Ordinal


def save_model(folder: str) -> None:
    torch.manual_seed(0)
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", model_max_length=32)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(**sizes, vocab_size=len(WORDS), max_position_embeddings=32)).save_pretrained(folder)


def rows(n: int, seed: int) -> list[dict[str, Any]]:
    """Six words, of which the first says the grade."""
    rng = np.random.default_rng(seed)
    made = [(grade, rng.integers(6, len(WORDS), 5)) for grade in rng.integers(GRADES, size=n).tolist()]
    return [{"text": " ".join([WORDS[1 + grade], *(WORDS[j] for j in rest)]), "label": grade} for grade, rest in made]


if __name__ == "__main__":
    save_model("new_task-model")
    write_rows(Path("train.jsonl"), rows(400, seed=0))
    write_rows(Path("test.jsonl"), rows(200, seed=1))
    run = tsq.train(
        model={"path": "new_task-model"},
        data={"train": "train.jsonl"},
        task={"type": "ordinal"},
        ranks={"policy": "tsqlora", "mean": 4, "interval": 10},
        training={"epochs": 6, "learning_rate": 1e-2, "batch_size": 16},
        out="new_task-run",
    )
    tsq.report(run)
    predict_run(run, Path("test.jsonl"), Path("predictions.csv"))
    ranks = RunRecord.load(run).ranks
    print("ranks:", {name.removeprefix("bert.encoder.layer."): rank for name, rank in ranks.items()})
    print("accuracy on new rows:", evaluate_run(run, Path("test.jsonl"))["accuracy"])
