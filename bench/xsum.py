"""XSum at low rank: SmolLM2-135M writes the summary of a news article's first sentences.

    python bench/xsum.py [--methods lora,tsqlora,adalora,elalora,eva] [--rates 5e-4,1e-3] [--seeds 0]

Rows as in bench/mixed_pool.py, of at most 130 tokens: some 600 to train on, 60 of validation, 100 of the test split;
mean rank 2, batches of 8, as many steps as one and a half passes over all rows take, in bfloat16. Every method has the
same steps, and of the rates the one with the lowest validation loss. Cells lie in a folder of `compare`, so that the
same command continues what was interrupted; results are in bench/results/xsum.json. On one core a cell takes 6 to 10
minutes.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from mixed_pool import FURTHER, TOKENS, model_folder, read
from origin import machine, parser_of, write

from tsqlora.compare.comparison import compare
from tsqlora.run.config import Config

CELLS = Path.home() / ".cache" / "tsqlora-bench" / "xsum"
ROWS = {"train": None, "validation": 60, "test": 100}
FRACTION, PASSES, MEAN = 0.5, 1.5, 2.0


def config_of(folder: Path) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    for split, most in ROWS.items():
        rows = [{"prompt": prompt, "completion": answer} for prompt, answer in read("xsum", split)[:most]]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config.model_validate(
        {
            "model": {"path": str(model_folder())},
            "task": {"type": "causal-lm", "max_new_tokens": 40},
            "data": {split: str(folder / f"{split}.jsonl") for split in ROWS}
            | {"max_length": TOKENS, "format": "prompt"},
            "quality": {"fraction": FRACTION},
            "ranks": {"policy": "tsqlora", "mean": MEAN},
            "adapter": {"alpha": 2 * MEAN},
            "training": {"epochs": round(PASSES / FRACTION), "batch_size": 8, **FURTHER},
        }
    )


def main() -> None:
    parser = parser_of(__doc__, "xsum")
    parser.add_argument("--methods", default="lora,tsqlora,adalora,elalora,eva")
    parser.add_argument("--rates", default="5e-4,1e-3")
    parser.add_argument("--seeds", default="0")
    request = parser.parse_args()
    torch.set_num_threads(1)
    for method in request.methods.split(","):
        compare(
            config_of(CELLS / "rows"),
            [method],
            seeds=[int(seed) for seed in request.seeds.split(",")],
            out=CELLS / "cells",
            sweep=[float(rate) for rate in request.rates.split(",")],
            metric="loss",
            say=lambda text: print(text, flush=True),
        )
    cells: list[dict[str, object]] = []
    for file in sorted((CELLS / "cells" / "cells").glob("*.json")):
        cell = json.loads(file.read_text())
        del cell["settings"]["data"], cell["settings"]["model"], cell["ranks"]
        cells.append(cell)
    write(request.out, {"cells": cells, "machine": machine()})


if __name__ == "__main__":
    main()
