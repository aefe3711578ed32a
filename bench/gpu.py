"""Everything that only a GPU can tell, in one command; on a CPU the same in miniature.

    python bench/gpu.py [--cases parity,sharded] [--out bench/results/gpu.json]

It needs this repository, torch, transformers and peft, and no download: weights come from configs. Each case writes its
result, or its error, into the JSON before the next one begins.

- `parity`: scores, sensitivities and moved ranks beside those of the CPU in float32.
- `quantized`: a 4-bit and an 8-bit base (bitsandbytes) trained with both callbacks.
- `compiled`, `checkpointing`: torch.compile, gradient checkpointing.
- `engines`: the launch lines of docs/scaling.md on one node, with as many processes as there are GPUs.
- `sharded`: FSDP2 on one device.
"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made import make_rows, save_checkpoint, write_config, write_jsonl
from origin import ROOT, commit, machine, parser_of, write
from peft import prepare_model_for_kbit_training
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

import tsqlora as tsq
from tsqlora import paper

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Row = dict[str, Any]
Result = dict[str, Any]


SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 200}


def encoder() -> Any:
    set_seed(0)
    return BertForSequenceClassification(BertConfig(**SHAPE, intermediate_size=256, num_labels=4))  # pyright: ignore[reportCallIssue]


def decoder() -> Any:
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=170))  # pyright: ignore[reportCallIssue]


def labelled(rows: int, tokens: int = 12, classes: int = 4) -> list[Row]:
    """Rows whose label is that of the word that repeats; no two rows are equal."""
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=rows)
    ids = rng.integers(10 + classes, SHAPE["vocab_size"], size=(rows, tokens))
    ids[:, : tokens // 2] = 10 + labels[:, None]
    return [{"input_ids": i.tolist(), "labels": int(label)} for i, label in zip(ids, labels, strict=True)]


def written(rows: int, tokens: int = 16) -> list[Row]:
    """Rows whose second half repeats the first."""
    ids = np.tile(np.random.default_rng(1).integers(10, SHAPE["vocab_size"], size=(rows, tokens // 2)), 2)
    labels = [-100] * (tokens // 2)
    return [{"input_ids": i.tolist(), "labels": labels + i[tokens // 2 :].tolist()} for i in ids]


def collate(rows: list[Row]) -> dict[str, Tensor]:
    ids, labels = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels"))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def arguments(folder: str, *, steps: int = 24, **also: Any) -> TrainingArguments:
    return TrainingArguments(
        folder,
        max_steps=steps,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not GPU,
        **also,
    )


def trained(model: Any, rows: list[Row], **also: Any) -> Result:
    """Train with both callbacks in a stock Trainer; the losses, and which ranks came out."""
    data = tsq.QualitySubset(rows, fraction=0.5, seed=0)
    ranks = paper.RankCallback(interval=4, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            arguments(folder, **also),
            train_dataset=data,
            data_collator=collate,
            callbacks=[tsq.QualityCallback(data), ranks],
        )
        loss = trainer.train().training_loss
    finite = all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad)
    return {"loss": loss, "finite": finite, "moves": len(ranks.events), "ranks": sorted(ranks.final.values())}


def parity() -> Result:
    """Relative differences to the CPU; both sides in float32 without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    result: Result = {}
    for name, build, rows in (("encoder", encoder, labelled(64)), ("decoder", decoder, written(64))):
        sides = []
        for device in ("cpu", DEVICE):
            model = paper.wrap(build(), mean_rank=4).to(device)
            scores = paper.score(model, rows, collate)
            measured = paper.sensitivity(model, rows, collate)
            sides.append(
                (scores.terms, np.array(list(measured.values.values())), paper.allocate(measured, mean_rank=4))
            )
        (cpu, layers, ranks), (gpu, other_layers, other_ranks) = sides
        result[name] = {term: relative(gpu[term], cpu[term]) for term in cpu}
        result[name] |= {"sensitivity": relative(other_layers, layers), "same ranks": ranks == other_ranks}
    return result


def relative(value: np.ndarray, exact: np.ndarray) -> float:
    return float(np.abs(value - exact).max() / max(np.abs(exact).max(), 1e-30))


def quantized() -> Result:
    if find_spec("bitsandbytes") is None:
        return {"skipped": "bitsandbytes is not installed"}
    result: Result = {}
    for bits in (4, 8):
        with tempfile.TemporaryDirectory() as folder:
            decoder().save_pretrained(folder)  # pyright: ignore[reportCallIssue]
            settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
            base = LlamaForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": DEVICE})
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        result[f"{bits} bits"] = trained(paper.wrap(base, mean_rank=4), written(64))
    return result


def compiled() -> Result:
    return trained(paper.wrap(encoder(), mean_rank=4), labelled(64), torch_compile=GPU)


def checkpointing() -> Result:
    return trained(paper.wrap(decoder(), mean_rank=4), written(64), gradient_checkpointing=True)


def launch_lines() -> list[str]:
    """The commands of docs/scaling.md that take a look and train on one node, as a reader would type them."""
    blocks = re.findall(r"```bash no-run\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)
    joined = re.sub(r"\\\n\s*|  +#.*", "", "\n".join(blocks))
    begins = ("tsqlora look tsq.yaml --out", "accelerate launch --num_processes", "accelerate launch --use_fsdp")
    return [line for line in joined.splitlines() if line.startswith(begins)]


def engines() -> Result:
    """The validation loss that each line of the docs ends with, and the seconds that it took."""
    results: Result = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_jsonl(folder / "train.jsonl", make_rows(400))
        write_config(folder / "tsq.yaml", save_checkpoint(folder / "model"), rows, ranks={"policy": "fixed"})
        lines = sorted(launch_lines(), key=lambda line: not line.startswith("tsqlora look"))
        for j, line in enumerate(lines if GPU else lines[:1]):
            command = re.sub(r"--num_processes \d+", f"--num_processes {torch.cuda.device_count()}", line)
            command = command.replace("--out run", f"--out run{j}")
            words = shlex.split(command.replace("tsqlora look", "-m tsqlora.cli look"))
            if words[0] == "accelerate":
                words = ["-m", "accelerate.commands.accelerate_cli", *words[1:]]
            begun = time.perf_counter()
            done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=150)
            record = folder / f"run{j}" / "run.json"
            metrics = json.loads(record.read_text())["metrics"] if record.exists() else None
            ended = {"metrics": metrics, "seconds": time.perf_counter() - begun}
            results[line] = ended if done.returncode == 0 else {"error": done.stderr[-2000:]}
    return results


def sharded() -> Result:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl" if GPU else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            model: Any = paper.wrap(encoder(), mean_rank=4).to(DEVICE).train()
            for layer in model.get_base_model().bert.encoder.layer:
                fully_shard(layer)
            fully_shard(model)
            optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
            ranks, rows, losses = paper.RankLoop(model, optimizer, total_steps=40, interval=10), labelled(64), []
            for step in range(40):
                ranks.before_forward()
                loss = model(**{n: x.to(DEVICE) for n, x in collate(rows[8 * (step % 8) :][:8]).items()}).loss
                loss.backward()
                ranks.before_optimizer_step()
                optimizer.step()
                ranks.after_optimizer_step()
                optimizer.zero_grad()
                losses.append(loss.item())
            ranks.finish(finalize_model=False)
        finally:
            dist.destroy_process_group()
    return {"first loss": losses[0], "last loss": losses[-1], "ranks": sorted(ranks.final.values())}


CASES: dict[str, Callable[[], Result]] = {
    case.__name__: case for case in (parity, quantized, compiled, checkpointing, engines, sharded)
}


def main() -> int:
    parser = parser_of(__doc__, "gpu")
    parser.add_argument("--cases", default=",".join(CASES))
    request = parser.parse_args()
    about = {**machine(), "device": torch.cuda.get_device_name() if GPU else "cpu"}
    results: dict[str, Any] = {"machine": about, "commit": commit(), "cases": {}}
    for name in request.cases.split(","):
        at = time.perf_counter()
        try:
            result = CASES[name]()
        except Exception as error:  # the next case shall run, whatever this one met
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        results["cases"][name] = {**result, "seconds": time.perf_counter() - at}
        print(name, results["cases"][name], flush=True)
        Path(request.out).parent.mkdir(parents=True, exist_ok=True)
        write(request.out, results)
    return int(any("error" in case for case in results["cases"].values()))


if __name__ == "__main__":
    sys.exit(main())
