"""Chats for trainers, with a number in each, and what was prepared of them, read without our package.

`python bench/trainers/llamafactory.py` and `axolotl.py` make an environment with the trainer, let its own code prepare
these chats, and compare the ledger with the tokens and labels that it saved.
"""

import bisect
import itertools
import json
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import pyarrow.parquet as pq
from origin import ROOT, commit, machine, write
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(ROOT / "tests"))

from families import FAMILIES, tokenizer_of
from tsqlora.auditing.texts.command import audit_text, prepared_set

FAMILY, LIMIT = "qwen 2.5", 400
WHERE = re.compile(r"row number (\d+)[,.]")
Rows = list[dict[str, Any]]


def chats() -> Rows:
    """Sixty chats: of one and of several turns, with a system prompt, too long, and with an empty answer."""
    rows = []
    for j in range(60):
        ask = {"role": "user", "content": f"Of row number {j}, what is the town?"}
        answer = {"role": "assistant", "content": f"The town of {j} is town {j * 7 % 13}." + " It is large." * (j % 5)}
        turns = [ask, answer]
        if j % 4 == 1:
            turns += [
                {"role": "user", "content": "And is it old?"},
                {"role": "assistant", "content": f"Since {1500 + j}."},
            ]
        if j % 5 == 2:
            turns = [{"role": "system", "content": "You answer briefly."}, *turns]
        if j % 10 == 3:
            answer["content"] += f" A long story about {j} follows, and goes on." * 12
        if j % 10 == 6:
            ask["content"] += f" It matters to me, since {j} reasons speak for it." * 12
        if j == 9:
            answer["content"] = ""
        rows.append({"messages": turns})
    return rows


def place_of(folder: Path) -> Path:
    """A folder with the chats, and a tiny model with a token a byte."""
    tokenizer, model = tokenizer_of(FAMILIES[FAMILY]), folder / "model"
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats()))
    return folder


def environment(folder: Path, *installs: Sequence[str]) -> Path:
    """The python of a virtual environment, made with these `pip install` arguments unless it is there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        for arguments in installs:
            subprocess.run([python, "-m", "pip", "install", "-q", *arguments], check=True)
    return python


def compared(prepared: Path, place: Path, out: Path) -> dict[str, Any]:
    """Compare each row of the ledger with the tokens and labels that were saved, by the number in its text."""
    made, tokenizer = prepared_set(prepared), tokenizer_of(FAMILIES[FAMILY])
    prepared_rows = dict[int, tuple[str, str]]()
    for row in made:
        text = [tokenizer.decode([token]) for token in row["input_ids"]]
        targets = ["" if label == -100 else tokenizer.decode([label]) for label in row["labels"]]
        begins = [match.start() for match in re.finditer(r"<\|im_start\|>system", "".join(text))] or [0]
        ends = itertools.accumulate(map(len, text))
        segments = [max(0, bisect.bisect_left(begins, end) - 1) for end in ends]
        for segment in range(len(begins)):
            own = [k for k, one in enumerate(segments) if one == segment]
            whole, target = ("".join(parts[k] for k in own) for parts in (text, targets))
            if number := WHERE.search(whole):
                prepared_rows[int(number[1])] = whole, target
    result = audit_text(str(place / "chats.jsonl"), prepared=prepared, model=str(place / "model"), out=out)
    wrong, fates = list[dict[str, Any]](), dict[str, int]()
    for line, row in zip(pq.read_table(out / "ledger.parquet").to_pylist(), chats(), strict=True):
        whole, target = prepared_rows.get(line["row"], (None, ""))
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        count = len(re.sub(r"<\|\w+\|>", "x", target))
        fate = "trained" if whole and all(answer in whole for answer in answers) else "cut"
        fate = "dropped" if whole is None else "nothing to train" if not target else fate
        fates[fate] = fates.get(fate, 0) + 1
        if (line["fate"], line["trained_tokens"]) != (fate, count):
            both = {"ledger": [line["fate"], line["trained_tokens"]], "prepared": [fate, count], "end": target[-60:]}
            wrong.append({"row": line["row"], **both})
    findings = {finding["name"]: finding["rows"] for finding in result["findings"]}
    return {"rows": len(made), "fates": fates, "unmatched": result["unmatched"], "findings": findings, "wrong": wrong}


def save(name: str, cells: dict[str, Any], out: Path, **about: Any) -> None:
    write(out, {"trainer": name, **about, "limit": LIMIT, "commit": commit(), "machine": machine(), "cells": cells})
    print(json.dumps(cells, indent=1))
