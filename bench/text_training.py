"""What answers that do not fit cost a language model, and what leaving them out wins back: one cell a file.

    python bench/text_training.py cut foreign --model DIR [--methods all,ours,perfect] [--seeds 0,1,2]

300 rows of Alpaca, of which a fifth has an answer that is cut in its middle (`cut`) or another row's (`foreign`). A
training takes 50 steps of 8 rows at rank 8: on all rows, on those that `tsqlora train` leaves (`ours`: the look plants
its own faults, and never sees which of these are faulty), or on the right ones. The loss is that of 60 other right
rows; 50 answers are written, at most 160 tokens each. A cell is a file in bench/results/text_training; a finished one
is not run again.
"""

import itertools
import json
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import chat, lines, prompt_of
from origin import ROOT, commit, machine, parser_of, stored
from transformers import AutoTokenizer

from tsqlora.quality.scores import Scores
from tsqlora.run.config import Config
from tsqlora.run.predict import predict_run
from tsqlora.run.train import train
from tsqlora.training.quality_callback import SCORES_FILE
from tsqlora.training.record import versions

RESULTS = ROOT / "bench" / "results" / "text_training"
ROWS, LOSS_ROWS, WRITTEN, TOKENS, STEPS, BATCH, RATE, SHARE = 300, 60, 50, 300, 50, 8, 5e-4, 0.2
MOST = 160
"""Most tokens of an answer that is written."""
QUALITY = {"all": {"enabled": False, "fraction": 1.0}, "ours": {"fraction": 1.0}}
METHODS = {"all": "all", "ours": "ours", "perfect": "all"}
"""The settings of `quality` of each way; `perfect` trains on the right rows alone."""
END = re.compile(r"[.!?:;)\"'`\]}]\s*$")
"""Of a sentence, a list or a block of code."""
Row = dict[str, Any]


def cut(answer: str, rng: np.random.Generator) -> str:
    """The answer up to a word between 30 and 70 % of it."""
    words = re.findall(r"\s*\S+", answer)
    return "".join(words[: max(1, round(len(words) * rng.uniform(0.3, 0.7)))])


def spoilt(rows: list[Row], kind: str, rng: np.random.Generator) -> tuple[list[Row], set[int]]:
    """The rows, of which a share has a faulty answer; and which."""
    wrong = rng.permutation(len(rows))[: round(SHARE * len(rows))].tolist()
    answers = [row["messages"][1]["content"] for row in rows]
    if kind == "cut":
        new = {j: cut(answers[j], rng) for j in wrong}
    else:
        new = {j: answers[k] for j, k in zip(wrong, [*wrong[1:], wrong[0]], strict=True)}
    made = [chat(row["messages"][0]["content"], new[j]) if j in new else row for j, row in enumerate(rows)]
    return made, {*wrong}


def run(kind: str, method: str, seed: int, model: str) -> dict[str, Any]:
    rng, tokenizer = np.random.default_rng([seed, 47]), AutoTokenizer.from_pretrained(model)
    rows = [chat(prompt_of(row), row["output"]) for row in lines("alpaca")]
    tokens = [[len(tokenizer(one["content"])["input_ids"]) for one in row["messages"]] for row in rows]
    short = [row for row, (prompt, answer) in zip(rows, tokens, strict=True) if prompt <= 90 and 12 <= answer <= 150]
    order = rng.permutation(len(short))
    parts = np.split(order, np.cumsum([ROWS, LOSS_ROWS, WRITTEN]))
    pool, others, unseen = ([short[j] for j in part] for part in parts[:3])
    pool, wrong = spoilt(pool, kind, rng)
    right = [row for j, row in enumerate(pool) if j not in wrong]
    with tempfile.TemporaryDirectory() as name:
        folder, begun = Path(name), time.process_time()
        files = {"train": right if method == "perfect" else pool, "validation": others, "test": unseen[:4]}
        for part, some in {**files, "unseen": unseen}.items():
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        settings = {
            "model": {"path": model, "dtype": "bfloat16"},
            "task": {"type": "causal-lm", "max_new_tokens": MOST},
            "data": {part: f"{folder}/{part}.jsonl" for part in files} | {"max_length": TOKENS},
            "quality": QUALITY[METHODS[method]],
            "training": {"max_steps": STEPS, "learning_rate": RATE, "batch_size": BATCH, "seed": seed}
            | {"warmup_steps": 0.06, "save_strategy": "no", "bf16": True},
        }
        record = train(Config.model_validate(settings), folder / "run")
        seconds = time.process_time() - begun
        predict_run(folder / "run", folder / "unseen.jsonl", folder / "written.jsonl")
        written = [json.loads(line)["prediction"] for line in (folder / "written.jsonl").read_text().splitlines()]
        scores = folder / "run" / SCORES_FILE
        left_out = {*np.flatnonzero(Scores.load(scores).reason_codes).tolist()} if method == "ours" else set[int]()
    lengths = [len(tokenizer(text)["input_ids"]) for text in written]
    ends = [
        bool(re.search(r"[.!?:;)\"'`\]}]\s*$", text)) and n < MOST for text, n in zip(written, lengths, strict=True)
    ]
    return {
        "settings": {"kind": kind, "method": method, "seed": seed, "model": Path(model).name, **settings["training"]},
        "loss": record.metrics["validation"]["loss"],
        "stops": float(np.mean([n < MOST for n in lengths])),
        "ends": float(np.mean(ends)),
        "words": float(np.mean([len(text.split()) for text in written])),
        "left_out": len(left_out),
        "wrong_left_out": len(wrong & left_out),
        "wrong": len(wrong),
        "written": written[:10],
        "notes": record.notes,
        "processor_seconds": seconds,
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("kinds", nargs="+", choices=("cut", "foreign"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    request = parser.parse_args()
    torch.set_num_threads(1)
    methods, seeds = request.methods.split(","), map(int, request.seeds.split(","))
    for seed, kind, method in itertools.product(seeds, request.kinds, methods):
        path = RESULTS / f"{kind}.{method}.{seed}.json"
        cell = stored(path, partial(run, kind, method, seed, request.model))
        print(kind, method, seed, {key: cell[key] for key in ("loss", "ends", "words", "left_out")}, flush=True)


if __name__ == "__main__":
    main()
