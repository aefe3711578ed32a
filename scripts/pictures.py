"""Makes docs/pictures from real runs: python scripts/pictures.py [NAME ...]

The demo's run gives the report and the rank map. Pages need a headless Chromium; without one, only the SVGs are made.
Two runs differ in their seconds.
"""

import base64
import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
LARGEST = 300_000
"""Bytes of a picture: README is read on phones, too."""
sys.path += [str(ROOT / "tests"), str(ROOT / "bench")]

from browser import Page, browser  # noqa: E402
from families import FAMILIES, trained_tokenizer  # noqa: E402
from tsqlora.cli import console  # noqa: E402
from tsqlora.cli.commands import app  # noqa: E402
from tsqlora.training.demo import bbc_news, run_demo  # noqa: E402


def recorder(width: int = 100) -> Console:
    """A terminal of this width that only remembers."""
    return Console(record=True, width=width, force_terminal=True, file=StringIO())


def save_svg(name: str, screen: Console, title: str) -> None:
    """Write what a terminal shows; in the reader's own fonts, so that nothing is loaded from elsewhere."""
    without_fonts = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    write(f"{name}.svg", screen.export_svg(title=title, code_format=without_fonts, unique_id=name).encode())


def write(name: str, content: bytes) -> None:
    if len(content) > LARGEST:
        sys.exit(f"{name} has {len(content):,} bytes; at most {LARGEST:,} are allowed")
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / name).write_bytes(content)
    print(f"{name}: {len(content):,} bytes")


def doctor(folder: Path) -> None:
    """The doctor's table of the adapter in docs/adapters.md, with two ranks and two scales."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    base = LlamaForCausalLM(LlamaConfig(vocab_size=60, num_hidden_layers=2, **sizes))
    ranks: dict[str, Any] = {"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 12}}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **ranks))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(str(folder / "adapter"))
    screen = recorder(width=120)
    console.terminal = lambda **_: screen
    with contextlib.chdir(folder):
        typer.main.get_command(app)(["doctor", "adapter"], standalone_mode=False)
    save_svg("doctor", screen, "tsqlora doctor adapter")


def screenshot(page: Page, name: str, *, of: str = "", height: int = 900) -> None:
    """The top of an open page, or one element of it, as a PNG."""
    page.run("new Promise(resolve => setTimeout(resolve, 1500))")  # plotly draws after the page has loaded
    find = f"(() => {{ const b = document.querySelector({of!r}).getBoundingClientRect();"
    box = page.run(f"{find} return [b.x, b.y + scrollY, b.width, b.height]; }})()") if of else [0, 0, 1200, height]
    clip = dict(zip(("x", "y", "width", "height"), box, strict=True)) | {"scale": 1}
    shot = page.send("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    write(f"{name}.png", base64.b64decode(shot["data"]))


def report(folder: Path) -> None:
    """The report of the demo's run, and its rank map."""
    run_demo(folder, seed=0, progress=None, say=print)
    with browser() as page:
        page.open(folder / "tsqlora" / "report.html", width=1200)
        screenshot(page, "report")
        screenshot(page, "ranks", of="#ranks")


def labels(folder: Path) -> None:
    """The review page of an audit of CLINC150's training rows as they are published."""
    rows = (ROOT / ".." / "shared" / "data" / "clinc150" / "train.jsonl").resolve()
    with contextlib.chdir(folder):
        typer.main.get_command(app)(["audit", str(rows), "--out", "labels"], standalone_mode=False)
    with browser() as page:
        page.open(folder / "labels" / "audit.html", width=1200)
        screenshot(page, "labels", height=890)


def chats(folder: Path) -> None:
    """The page of an audit of chats about news, of which some are test rows, too long, copies, or without an answer."""
    news = [text for text, _ in bbc_news()][:60]
    tokenizer = trained_tokenizer(FAMILIES["qwen 2.5"], news, 6_000)
    tokenizer.save_pretrained(folder / "model")
    ends = tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, eos_token_id=ends)
    config.save_pretrained(folder / "model")
    rows = list[tuple[str, str]]()
    for j, text in enumerate(news):
        first, *others = re.split(r"(?<=[.!?])\s+", text)
        rows.append((f"Sum this up in a few sentences: {text[:400]}", " ".join([first, *others[: 12 * (j % 9 == 4)]])))
    rows += [*rows[3:5], (rows[7][0], "")]
    turns = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in rows]
    for name, part in (("chats", turns), ("test", turns[10:13])):
        lines = "".join(json.dumps({"messages": one}) + "\n" for one in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    call = ["audit", "chats.jsonl", "--eval", "test.jsonl", "--model", "model", "--out", "chats"]
    call += ["--set", "data.max_length=300"]
    with contextlib.chdir(folder):
        typer.main.get_command(app)(call, standalone_mode=False)
    with browser() as page:
        page.open(folder / "chats" / "audit.html", width=1200)
        screenshot(page, "chats")


def forest(_: Path) -> None:
    """What each way to train gains over even draws, world by world, from bench/results/worlds."""
    from differences import plot

    write("worlds.svg", plot())


MAKERS: dict[str, Callable[[Path], Any]] = {
    "forest": forest,
    "doctor": doctor,
    "report": report,
    "labels": labels,
    "chats": chats,
}


def main() -> None:
    names = sys.argv[1:] or list(MAKERS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in names:
            try:
                MAKERS[name](folder)
            except pytest.skip.Exception as why:
                print(f"{name}: {why}", file=sys.stderr)


if __name__ == "__main__":
    main()
