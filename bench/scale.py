"""What grows with rows, and what does not.

    python bench/scale.py rows [--rows 100000,1000000]   # rows scored and drawn by a tiny model, and its memory
    python bench/scale.py parts [--rows 100000,1000000]  # in a hundred parts, by the look of a sample
    python bench/scale.py chats [--rows 50000]           # the ledger and the findings of chats, and its memory

Each part runs in its own process, and is an entry of bench/results/scale.json. Seconds are the processor's.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from made import BAD, GOOD, PLAIN, make_rows, save_checkpoint, write_config, write_jsonl
from origin import ROOT, commit, parser_of, read, write

from tsqlora import paper
from tsqlora.auditing.draw.select import select_rows
from tsqlora.auditing.texts.command import audit_text
from tsqlora.rows.splits import prepare
from tsqlora.rows.table import stored_in
from tsqlora.settings import load_config
from tsqlora.training import job as reading
from tsqlora.training.command import train
from tsqlora.training.job import open_run
from tsqlora.training.look import look_at, score_by_look

CACHE = ROOT / "bench" / ".cache" / "scale"


def status(name: str) -> int:
    """A number of /proc/self/status: bytes, or how many."""
    words = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")
    ).split()
    return int(words[1]) * (1024 if words[2:] else 1)


# ------------------------------------------------------------------------------------ rows


def finished_run() -> Path:
    """A short run of the tiny BERT, whose weights then score."""
    run = CACHE / "run"
    if not (run / "run.json").exists():
        shutil.rmtree(CACHE, ignore_errors=True)
        save_checkpoint(CACHE / "model")
        write_jsonl(CACHE / "few.jsonl", make_rows(2000))
        plain: dict[str, Any] = {
            "quality": {"enabled": False, "fraction": 1.0},
            "ranks": {"policy": "fixed", "mean": 2.0},
        }
        config = write_config(CACHE / "c.yaml", CACHE / "model", CACHE / "few.jsonl", **plain, training={"epochs": 2})
        train(load_config(config), run)
    return run


def write_many(path: Path, count: int, seed: int | None = None) -> None:
    rng = random.Random(count if seed is None else seed)
    with open(path, "w") as file:
        for j in range(count):
            words = [*rng.sample((BAD, GOOD)[j % 2], 3), *rng.choices(PLAIN, k=7)]
            rng.shuffle(words)
            file.write(json.dumps({"text": " ".join(words), "label": j % 2}) + "\n")


def rows(count: int) -> dict[str, Any]:
    """What `tsqlora score` does with a file of so many rows, by the loss alone, and `tsqlora select`."""
    run, file, table = open_run(finished_run()), CACHE / f"{count}.jsonl", CACHE / f"{count}.parquet"
    write_many(file, count)
    before, start = status("VmRSS"), time.process_time()
    files = {"train": str(file), "validation": str(CACHE / "few.jsonl"), "test": None}
    with stored_in(CACHE):
        tables = reading.read(run.config.model_copy(update={"data": run.config.data.model_copy(update=files)}))
        how = {"max_length": run.max_length, "encode": run.task.reading.encode}
        split = prepare(tables, run.pretrained.tokenizer, **how)["train"].samples
    stored = time.process_time() - start
    about = {"columns": asdict(tables["train"].columns), "data": str(file)}
    names = paper.RowNames(split.ids, split.hashes, split.lengths, about)
    rule, compute = paper.ScoringRule(weights={"loss": 1.0}), paper.Compute(batch_size=1024)
    scores = paper.score(run.model, split, run.collate, rule=rule, rows=names, compute=compute)
    scores.save(table)
    scored, peak = time.process_time() - start, status("VmHWM")
    del scores
    drawn = select_rows(table, CACHE / f"{count}.subset.jsonl", fraction=0.3, seed=0, data=file)
    result = {
        "rows": count,
        "drawn": drawn,
        "processor_seconds": round(time.process_time() - start, 1),
        "of_them_reading": round(stored, 1),
        "of_them_scoring": round(scored - stored, 1),
        "bytes_before": before,
        "peak_bytes_scoring": peak,
        "peak_bytes": status("VmHWM"),
        "file_bytes": file.stat().st_size,
        "scores_bytes": table.stat().st_size,
    }
    for path in (file, table, CACHE / f"{count}.subset.jsonl"):
        path.unlink()
    return result


PARTS, SAMPLE = 100, 10_000


def in_parts(count: int) -> dict[str, Any]:
    """What `tsqlora look` does with a sample, `tsqlora score --look` with a hundred parts, and `tsqlora select`."""
    finished_run()
    place = CACHE / "parts"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for j in range(PARTS):
        write_many(place / f"{j:03}.jsonl", count // PARTS, seed=j)
    write_many(place / "sample.jsonl", SAMPLE)
    before, seconds = status("VmRSS"), [time.process_time()]
    look_at(load_config(CACHE / "c.yaml", [f"data.train={place / 'sample.jsonl'}"]), place / "LOOK")
    seconds.append(time.process_time())
    for j in range(PARTS):
        score_by_look(str(place / f"{j:03}.jsonl"), place / "LOOK", place / "scores" / f"{j:03}.parquet")
    seconds.append(time.process_time())
    peak = status("VmHWM")
    drawn = select_rows(place / "scores", place / "subset.jsonl", fraction=0.3, data=place)
    seconds.append(time.process_time())
    look, score, select = (round(b - a, 1) for a, b in pairwise(seconds))
    result = {
        "rows": count,
        "parts": PARTS,
        "sample": SAMPLE,
        "drawn": drawn,
        "processor_seconds": {"look": look, "score": score, "select": select},
        "bytes_before": before,
        "peak_bytes_scoring": peak,
        "peak_bytes": status("VmHWM"),
        "scores_bytes": sum(path.stat().st_size for path in (place / "scores").iterdir()),
    }
    shutil.rmtree(place)
    return result


# ----------------------------------------------------------------------------------- chats

QUESTION, ANSWER = 60, 140
"""Words of a chat."""


def write_chats(path: Path, count: int) -> None:
    rng = random.Random(count)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    with open(path, "w") as file:
        for _ in range(count):
            texts = [" ".join(rng.choices(words, k=length)) for length in (QUESTION, ANSWER)]
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
            file.write(json.dumps({"messages": turns}) + "\n")


def chats(count: int) -> dict[str, Any]:
    """What `tsqlora audit --no-model` does with so many chats of 200 words: bytes, mapped files aside."""
    sys.path.insert(0, str(ROOT / "tests"))
    from days.families import model_folder

    file, out, seen, done = CACHE / f"{count}-chats.jsonl", CACHE / "audit", list[int](), threading.Event()
    shutil.rmtree(out, ignore_errors=True)
    write_chats(file, count)

    def watch() -> None:
        while not done.wait(0.05):
            seen.append(status("RssAnon"))

    threading.Thread(target=watch, daemon=True).start()
    before, start = status("RssAnon"), time.process_time()
    audit = audit_text(str(file), model=str(model_folder("qwen 2.5")), answers=False, out=out)
    done.set()
    result = {
        "rows": count,
        "findings": {one["name"]: one["rows"] for one in audit["findings"]},
        "processor_seconds": round(time.process_time() - start, 1),
        "bytes_before": before,
        "peak_bytes": max(seen),
        "file_bytes": file.stat().st_size,
    }
    file.unlink()
    return result


# ------------------------------------------------------------------------------------ main


def main() -> None:
    parts: dict[str, Callable[[int], dict[str, Any]]] = {"rows": rows, "parts": in_parts, "chats": chats}
    parser = parser_of(__doc__, "scale")
    parser.add_argument("part", choices=parts)
    parser.add_argument("--rows", default="100000,1000000")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    CACHE.mkdir(parents=True, exist_ok=True)
    if "," in arguments.rows:
        for count in arguments.rows.split(","):
            command = [sys.executable, __file__, arguments.part, "--rows", count, "--out", str(arguments.out)]
            subprocess.run(command, check=True)
        return
    result, key = parts[arguments.part](int(arguments.rows)), f"{arguments.part}-{arguments.rows}"
    entry = {"commit": (commit() or "unknown")[:7], "torch": torch.__version__, "found": result}
    write(arguments.out, read(arguments.out) | {key: entry})
    print(key, json.dumps(result)[:600])


if __name__ == "__main__":
    main()
