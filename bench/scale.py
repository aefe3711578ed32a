"""What grows and what does not: rows, steps, and the terms of the cost model in docs/scaling.md.

    python bench/scale.py rows [--rows 100000,1000000]   # rows scored and drawn by a tiny model, and its memory
    python bench/scale.py parts [--rows 100000,1000000]  # in a hundred parts, by the look of a sample
    python bench/scale.py chats [--rows 50000]           # the ledger and the findings of chats, and its memory
    python bench/scale.py steps [--steps 100000]         # memory, handles and records of a run of many short steps
    python bench/scale.py model                          # operations, bytes held, bytes sent: counted, beside the model
    python bench/scale.py processes                      # rows scored and bytes sent by 1, 2 and 3 processes

Each part runs in its own process, and is an entry of bench/results/scale.json. Operations and bytes are counted, not
timed, so that they do not depend on what else the machine does; seconds are the processor's, and say so.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import torch.distributed as dist
from made import BAD, GOOD, PLAIN, bert, make_rows, save_checkpoint, write_config, write_jsonl
from origin import ROOT, commit, parser_of, read, write
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import tsqlora as tsq
from tsqlora.data.splits import prepare
from tsqlora.quality.rule import PAPER_TERMS
from tsqlora.quality.select import select_rows
from tsqlora.run import job as reading
from tsqlora.run.config import load_config
from tsqlora.run.finished import open_run
from tsqlora.run.look import look_at, score_by_look
from tsqlora.run.text_audit import audit_text
from tsqlora.run.train import train

CACHE = ROOT / "bench" / ".cache" / "scale"
MIB = 2**20


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
    tables = reading.read(run.config.model_copy(update={"data": run.config.data.model_copy(update=files)}), CACHE)
    split = prepare(
        tables, run.pretrained.tokenizer, max_length=run.max_length, encode=run.task.reading.encode, folder=CACHE
    )["train"].samples
    stored = time.process_time() - start
    about = {"columns": asdict(tables["train"].columns), "data": str(file)}
    names = tsq.RowNames(split.ids, split.hashes, split.lengths, about)
    rule, compute = tsq.ScoringRule(weights={"loss": 1.0}), tsq.Compute(batch_size=1024)
    scores = tsq.score(run.model, split, run.predictor.collate(), rule=rule, rows=names, compute=compute)
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


# ----------------------------------------------------------------------------------- steps


class Watch(TrainerCallback):
    """Bytes, open files and threads of the process, a hundred times in a run."""

    def __init__(self, steps: int) -> None:
        self.every, self.seen = max(steps // 100, 1), list[dict[str, int]]()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            handles = len(os.listdir("/proc/self/fd"))
            self.seen.append(
                {"step": state.global_step, "bytes": status("VmRSS"), "handles": handles, "threads": status("Threads")}
            )


def steps(count: int) -> dict[str, Any]:
    """Short steps of a tiny BERT with quality draws, and every ten random ranks, so that slots never stop moving."""
    model = tsq.wrap(bert(vocab=100, layers=1, hidden=8, labels=2), mean_rank=4)
    data = tsq.QualitySubset(sentences(64, 8), fraction=0.5, seed=0)
    ranks, watch = (
        tsq.RankCallback(estimator="random", interval=10, schedule=tsq.RankSchedule(warmup=0.0, freeze=0.0)),
        Watch(count),
    )
    args = TrainingArguments(
        str(CACHE / "steps"), max_steps=count, per_device_train_batch_size=8, learning_rate=0.003, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=10, disable_tqdm=True,
    )  # fmt: skip
    callbacks = [tsq.QualityCallback(data), ranks, watch]
    trainer = Trainer(model, args, train_dataset=data, data_collator=collate, callbacks=callbacks)
    start = time.process_time()
    trainer.train()
    settled = [seen for seen in watch.seen if seen["step"] > count // 5]
    first, last = settled[: len(settled) // 4], settled[-len(settled) // 4 :]

    def mean(part: list[dict[str, int]], name: str) -> float:
        return sum(seen[name] for seen in part) / len(part)

    return {
        "steps": count,
        "processor_seconds": round(time.process_time() - start, 1),
        "growth_bytes_a_step": round(
            (mean(last, "bytes") - mean(first, "bytes")) / (mean(last, "step") - mean(first, "step")), 1
        ),
        "handles": [min(s["handles"] for s in settled), max(s["handles"] for s in settled)],
        "threads": [min(s["threads"] for s in settled), max(s["threads"] for s in settled)],
        "bytes": [settled[0]["bytes"], settled[-1]["bytes"]],
        "adjustments_kept": len(ranks.events),
        "slots_moved": sum(event.moved for event in ranks.events),
        "trainer_log_bytes": len(json.dumps(trainer.state.log_history)),
        "samples": watch.seen[:: max(len(watch.seen) // 20, 1)],
    }


# ----------------------------------------------------------------------------------- model


def llama(*, tokens: int, width: int, depth: int) -> Any:
    config = LlamaConfig(
        vocab_size=100, hidden_size=width, num_hidden_layers=depth, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=4 * width, max_position_embeddings=tokens, pad_token_id=0, num_labels=2,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return tsq.wrap(LlamaForSequenceClassification(config), mean_rank=4)


def sentences(count: int, tokens: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows_ = []
    for j in range(count):
        ids = [rng.randint(1, 49) + 50 * (j % 2) for _ in range(tokens)]
        rows_.append({"input_ids": ids, "attention_mask": [1] * tokens, "labels": j % 2})
    return rows_


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of rows of one length."""
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


@contextmanager
def held(model: nn.Module) -> Iterator[list[int]]:
    """Bytes that autograd keeps for the backward pass beside the parameters, each tensor's memory counted once."""
    seen = {parameter.untyped_storage().data_ptr(): 0 for parameter in model.parameters()}
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            total[0] = sum(seen.values())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def counted(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def predicted(model: Any, tokens: int, width: int, depth: int) -> dict[str, float]:
    """The terms of docs/scaling.md, for one sample."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear = sum(m.weight.numel() for name, m in layers.items() if name.endswith("base_layer"))
    lora = sum(m.weight.numel() for name, m in layers.items() if "lora_" in name)
    attention = 4 * tokens**2 * width * depth
    forward = 2 * tokens * (linear + lora) + attention
    # Backward: the gradient of the inputs of each layer, and of A and B; of the attention's products both factors'.
    return {"forward": forward, "step": forward + 2 * tokens * (linear + 2 * lora) + 2 * attention}


def model_point(*, count: int, tokens: int, width: int, depth: int) -> dict[str, Any]:
    model = llama(tokens=tokens, width=width, depth=depth)
    batch = collate(sentences(count, tokens))

    def step() -> None:
        model(**batch).loss.backward()

    def forward() -> None:
        with torch.no_grad():
            model(**batch)

    with held(model) as inputs:
        model(**batch)
    formula = predicted(model, tokens, width, depth)
    return {
        "rows": count, "tokens": tokens, "width": width, "depth": depth,
        "forward": counted(forward), "forward_predicted": count * formula["forward"],
        "step": counted(step), "step_predicted": count * formula["step"],
        "held_bytes": inputs[0],
        "held_a_token_and_layer_of_width": round(inputs[0] / (count * tokens * width * depth), 2),
    }  # fmt: skip


BASE = {"count": 8, "tokens": 64, "width": 64, "depth": 4}


def model() -> list[dict[str, Any]]:
    """Each of rows, length, width and depth doubled, and doubled again."""
    points = [BASE]
    for name in BASE:
        points += [BASE | {name: BASE[name] * factor} for factor in (2, 4)]
    return [model_point(**point) for point in points]


# ------------------------------------------------------------------------------- processes


def one_process(rank: int, processes: int, folder: Path) -> None:
    """A DDP step whose gradients' bytes are counted, and a scoring of 96 rows that all processes share."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    sent = 0
    model = llama(tokens=32, width=64, depth=4)
    rows_ = sentences(96, 32)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    wrapped = DistributedDataParallel(model)

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal sent
        sent += bucket.buffer().nbytes
        return dist.all_reduce(bucket.buffer() / processes, async_op=True).get_future().then(lambda f: f.value()[0])

    wrapped.register_comm_hook(None, hook)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(30):
        sent = 0
        wrapped(**collate(rows_[rank::processes][:16])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    forwards = 0

    def count_rows(module: nn.Module, arguments: Any, kwargs: Any) -> None:
        nonlocal forwards
        forwards += len(kwargs["input_ids"])

    handle = model.register_forward_pre_hook(count_rows, with_kwargs=True)
    start = time.process_time()
    rule = tsq.ScoringRule(terms=PAPER_TERMS, reference=range(16))
    names = tsq.RowNames(hashes=[str(j) for j in range(96)])
    tsq.score(model, rows_, collate, rule=rule, rows=names, compute=tsq.Compute(batch_size=8))
    seconds = time.process_time() - start
    handle.remove()
    result = {
        "trainable": trainable,
        "bytes_a_step": sent,
        "rows_forward": forwards,
        "processor_seconds": round(seconds, 2),
    }
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    del wrapped  # once the group is gone its end may hang
    dist.destroy_process_group()


def processes(count: int) -> dict[str, Any]:
    folder = CACHE / f"processes-{count}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.multiprocessing.start_processes(one_process, (count, folder), nprocs=count, start_method="spawn")
    return {"processes": count, "each": [json.loads((folder / f"{j}.json").read_text()) for j in range(count)]}


# ------------------------------------------------------------------------------------ main


def main() -> None:
    parts: dict[str, Callable[[], Any]] = {
        "rows": lambda: rows(int(arguments.rows)),
        "parts": lambda: in_parts(int(arguments.rows)),
        "chats": lambda: chats(int(arguments.rows)),
        "steps": lambda: steps(arguments.steps),
        "model": model,
        "processes": lambda: [processes(count) for count in (1, 2, 3)],
    }
    parser = parser_of(__doc__, "scale")
    parser.add_argument("part", choices=parts)
    parser.add_argument("--rows", default="100000,1000000")
    parser.add_argument("--steps", type=int, default=100_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    CACHE.mkdir(parents=True, exist_ok=True)
    counted = arguments.part in ("rows", "parts", "chats")
    if counted and "," in arguments.rows:
        for count in arguments.rows.split(","):
            command = [sys.executable, __file__, arguments.part, "--rows", count, "--out", str(arguments.out)]
            subprocess.run(command, check=True)
        return
    result = parts[arguments.part]()
    key = f"{arguments.part}-{arguments.rows}" if counted else arguments.part
    entry = {"commit": (commit() or "unknown")[:7], "torch": torch.__version__, "found": result}
    write(arguments.out, read(arguments.out) | {key: entry})
    print(key, json.dumps(result)[:600])


if __name__ == "__main__":
    main()
