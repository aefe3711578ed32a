"""Swapped preference pairs: how well 64 trusted rows find them.

    python bench/preferences.py [--model stories260K|smollm2] [--rows 400] [--seeds 0,1,2]

SciTLDR as pairs: the chosen answer is the paper's own summary, the rejected one another paper's. A fifth of the pool is
swapped. A pair is suspected by the DPO loss of the trusted model, and flagged where that model prefers the rejected
answer. Each cell is a file in bench/results/preferences.
"""

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from datasets import Dataset
from mixed_pool import SHARED, model_folder, read
from origin import ROOT, commit, machine, parser_of, stored
from peft import LoraConfig, get_peft_model
from sklearn.metrics import average_precision_score, roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsqlora.quality.rule import ScoringRule
from tsqlora.quality.trusted import STEPS
from tsqlora.run.pool import score_pool
from tsqlora.training.record import versions

RESULTS = Path(os.environ.get("RESULTS", ROOT / "bench" / "results" / "preferences"))
TRUSTED, SWAPPED, TOKENS, BATCH, RATE = 64, 0.2, 130, 8, 5e-4


def pairs_of(rows: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]], np.ndarray]:
    """The pool, the trusted rows, and which rows of the pool are swapped."""
    rng = np.random.default_rng([seed, 37])
    papers = read("scitldr", "train")
    take = [papers[j] for j in rng.permutation(len(papers))[: rows + TRUSTED]]
    pairs = [{"prompt": p, "chosen": a, "rejected": take[j - 1][1]} for j, (p, a) in enumerate(take)]
    pool, swapped = pairs[TRUSTED:], rng.permutation(rows) < SWAPPED * rows
    mixed = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if wrong else row
        for row, wrong in zip(pool, swapped, strict=True)
    ]
    return mixed, pairs[:TRUSTED], swapped


def cell(name: str, rows: int, seed: int) -> dict[str, Any]:
    folder = model_folder() if name == "smollm2" else SHARED / ".." / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if name == "smollm2" else torch.float32),
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    pool, trusted, swapped = pairs_of(rows, seed)
    begun = time.process_time()
    scores = score_pool(
        model,
        Dataset.from_list(pool),
        Dataset.from_list(trusted),
        tokenizer,
        fraction=0.5,
        rule=ScoringRule(seed=seed),
        learning_rate=RATE,
        batch_size=BATCH,
        max_length=None if name == "smollm2" else 512,
    )
    own, loss = swapped[scores.row_ids], scores.terms.get("trusted_loss")
    flagged = scores.left_out_as("swapped pair")
    return {
        "settings": {"model": name, "rows": rows, "seed": seed, "trusted": TRUSTED, "swapped": SWAPPED, "rate": RATE}
        | {"steps": STEPS, "batch": BATCH},
        "scored": len(own),
        "why_not": None if scores.record.gate is None else scores.record.gate.get("why_not"),
        "area": None if loss is None else float(roc_auc_score(own, loss)),
        "average_precision": None if loss is None else float(average_precision_score(own, loss)),
        "flagged": int(flagged.sum()),
        "precision": float(own[flagged].mean()) if flagged.any() else None,
        "recall": None if loss is None else float(flagged[own].mean()),
        "processor_seconds": time.process_time() - begun,
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", choices=("stories260K", "smollm2"), default="stories260K")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    for seed in map(int, args.seeds.split(",")):
        path = RESULTS / f"{args.model}-{seed}.json"
        result = stored(path, partial(cell, args.model, args.rows, seed))
        print(path.name, {name: result[name] for name in ("why_not", "area", "precision", "recall")})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
