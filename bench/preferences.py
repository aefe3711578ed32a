"""What swapped preference pairs cost a DPO training, and what leaving them out wins back: one cell a file.

    python bench/preferences.py --model DIR [--methods all,ours,perfect,robust] [--seeds 0,1,2]

160 pairs of Alpaca: a row's own answer is chosen over another row's, or the other way round in a fifth of them. TRL's
DPOTrainer takes 25 steps of 8 pairs at rank 8: on all pairs, on those that `tsq.select(..., drop="evident")` returns
(`ours`), on the right ones, or on all with DPO's robust loss that knows the share of swapped pairs. The result is the
share of 100 other, right pairs whose chosen answer the trained model prefers more than the base does. A cell is a file
in bench/results/preferences; a finished one is not run again.
"""

import itertools
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import lines, prompt_of
from datasets import Dataset
from origin import ROOT, commit, machine, parser_of, stored
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import tsqlora as tsq
from tsqlora.training.record import versions

RESULTS = ROOT / "bench" / "results" / "preferences"
PAIRS, TESTED, SHARE, STEPS, BATCH, RATE = 160, 100, 0.2, 25, 8, 2e-4
METHODS: dict[str, dict[str, Any]] = {
    "all": {},
    "ours": {},
    "perfect": {},
    "robust": {"loss_type": "robust", "label_smoothing": SHARE},
}
"""Arguments of DPOConfig."""


def pairs(tokenizer: Any, rng: np.random.Generator) -> tuple[list[dict[str, Any]], list[dict[str, Any]], set[int]]:
    """Pairs to train on and right pairs to test with; and which of the first are swapped."""
    rows = [
        row
        for row in lines("alpaca")
        if len(tokenizer(prompt_of(row))["input_ids"]) <= 60 and 8 <= len(tokenizer(row["output"])["input_ids"]) <= 80
    ]
    order = rng.permutation(len(rows))[: PAIRS + TESTED]
    made = list[dict[str, Any]]()
    for part in (order[:PAIRS], order[PAIRS:]):
        for j, other in zip(part, np.roll(part, 1), strict=True):
            sides = {"chosen": rows[j]["output"], "rejected": rows[other]["output"]}
            prompt = [{"role": "user", "content": prompt_of(rows[j])}]
            made.append({"prompt": prompt} | {k: [{"role": "assistant", "content": v}] for k, v in sides.items()})
    swapped = {*rng.permutation(PAIRS)[: round(SHARE * PAIRS)].tolist()}
    train = [
        {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} if j in swapped else row
        for j, row in enumerate(made[:PAIRS])
    ]
    return train, made[PAIRS:], swapped


def run(method: str, seed: int, path: str) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    train, tested, swapped = pairs(tokenizer, np.random.default_rng([seed, 48]))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    retained, begun = {*range(PAIRS)}, time.process_time()
    if method == "ours":
        rows = Dataset.from_list([row | {"place": j} for j, row in enumerate(train)])
        chosen = tsq.select(model, rows, processing_class=tokenizer, fraction=1.0, drop="evident", seed=seed)
        retained = {*chosen["place"]}
    elif method == "perfect":
        retained -= swapped
    looked = time.process_time() - begun
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=RATE,
            seed=seed,
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            max_length=200,
            save_strategy="no",
            report_to="none",
            logging_steps=STEPS,
            disable_tqdm=True,
            **METHODS[method],
        )
        trainer = DPOTrainer(
            model,
            args=arguments,
            train_dataset=Dataset.from_list([row for j, row in enumerate(train) if j in retained]),
            eval_dataset=Dataset.from_list(tested),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        metrics = trainer.evaluate()
    return {
        "settings": {"method": method, "seed": seed, "model": Path(path).name, "pairs": PAIRS, "tested": TESTED}
        | {"max_steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, "beta": arguments.beta},
        "accuracy": metrics["eval_rewards/accuracies"],
        "margin": metrics["eval_rewards/margins"],
        "swapped": len(swapped),
        "left_out": PAIRS - len(retained),
        "swapped_left_out": len(swapped - retained),
        "look_seconds": looked,
        "processor_seconds": time.process_time() - begun,
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    request = parser.parse_args()
    torch.set_num_threads(1)
    for seed, method in itertools.product(map(int, request.seeds.split(",")), request.methods.split(",")):
        cell = stored(RESULTS / f"{method}.{seed}.json", partial(run, method, seed, request.model))
        keys = ("accuracy", "margin", "left_out", "swapped_left_out", "processor_seconds")
        print(method, seed, {key: cell[key] for key in keys}, flush=True)


if __name__ == "__main__":
    main()
