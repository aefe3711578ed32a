"""Score tables of any size with Ray Data: each actor holds the model and a look, and `tsqlora select` reads the parts.

tsqlora look tsq.yaml --set data.train=sample.jsonl --out LOOK
python examples/ray_data.py LOOK rows/ PARTS
tsqlora select PARTS --fraction 0.3 --out subset.jsonl
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tsqlora as tsq
from tsqlora.auditing.saved_look import SavedLook
from tsqlora.rows.rows import Columns, row_hash

Table = dict[str, np.ndarray]


class Score:
    """Adds what a look says of each row; a label that the look has not seen has a reason and no loss."""

    def __init__(self, look: str, max_length: int = 128) -> None:
        self.look, self.max_length = SavedLook.load(look), max_length
        record, name = self.look.scores.record.to_dict(), self.look.about["model"]  # Ray pickles no attribute `classes`
        self.numbers = {label: number for number, label in enumerate(record["classes"])}
        self.columns = Columns(**record["columns"])
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(self.numbers))
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, rows: Table) -> Table:
        cells = [dict(zip(rows, row, strict=True)) for row in zip(*map(np.ndarray.tolist, rows.values()), strict=True)]
        texts = [[row[name] for row in cells] for name in (self.columns.text, self.columns.text_pair) if name]
        batch = self.tokenizer(*texts, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt")
        batch["labels"] = torch.tensor([self.numbers.get(row[self.columns.label or "label"], -1) for row in cells])
        hashes = [row_hash(row, self.columns) for row in cells]
        columns = tsq.apply(self.model, self.look, batch, hashes=hashes)
        return rows | {name: columns[name] for name in columns.keys() - {"labels", "logits"}}


if __name__ == "__main__":
    import ray  # pyright: ignore[reportMissingImports]

    look, source, parts = (str(Path(name).absolute()) for name in sys.argv[1:])
    actors = {"compute": ray.data.ActorPoolStrategy(size=1), "num_gpus": int(torch.cuda.is_available())}
    scored = ray.data.read_json(source).map_batches(Score, fn_constructor_args=[look], batch_size=256, **actors)
    scored.write_parquet(parts)
