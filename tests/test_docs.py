"""What a reader may copy from README.md and docs/ runs as it stands there.

The python and bash blocks of a file run in their order, in one directory; its python blocks share
one namespace. A bash block is left out by `no-run` after its language, any block by
`<!-- not run: reason -->` above it. A yaml block with a `model:` must load as settings.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\s*)?"
    r"^(?P<indent> *)(?P<fence>```+)(?P<info>[^\n`]*)\n(?P<code>.*?)^ *(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)

# Runs (language, code, place) triples from stdin; a failed one ends it.
RUNNER = """
import json, subprocess, sys
namespace = {"__name__": "__main__"}
for language, code, place in json.load(sys.stdin):
    print(f"--- {place}", flush=True)
    if language == "python":
        exec(compile(code, place, "exec"), namespace)
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True, stdin=subprocess.DEVNULL)
"""


class Block(NamedTuple):
    language: str
    code: str
    place: str
    skipped: str | None


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    blocks: list[Block] = []
    for match in FENCED.finditer(text):
        language, *words = match["info"].split() or [""]
        language = {"sh": "bash", "py": "python", "yml": "yaml"}.get(language, language)
        skipped = match["reason"] or ("no-run" if language == "bash" and "no-run" in words else None)
        line = text.count("\n", 0, match.start("fence")) + 1
        place = f"{document.relative_to(ROOT)}:{line}" if document.is_relative_to(ROOT) else f"line {line}"
        blocks.append(Block(language, textwrap.dedent(match["code"]), place, skipped))
    return blocks


def steps_of(blocks: list[Block]) -> list[tuple[str, str, str]]:
    return [block[:3] for block in blocks if block.language in ("python", "bash") and not block.skipped]


def steps_in(document: Path) -> int:
    return len(steps_of(blocks_of(document)))


def run(blocks: list[Block], directory: Path) -> subprocess.CompletedProcess[str]:
    """The blocks that can run, in order, with the tools of this environment first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Where documents run side by side, each has a core.
    threads = {"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {}
    return subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(steps_of(blocks)),
        cwd=directory,
        env=os.environ | threads | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


ALL = [block for document in DOCUMENTS for block in blocks_of(document)]
SKIPPED = [block for block in ALL if block.skipped]
SETTINGS = [block for block in ALL if block.language == "yaml" and re.search(r"^model:", block.code, re.MULTILINE)]


SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def tiny_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In place of SmolLM2, which tests cannot download."""
    from families import FAMILIES, trained_tokenizer
    from tsqlora.training.demo import bbc_news
    from words import llama

    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = trained_tokenizer(FAMILIES["qwen 2.5"], [text for text, _ in bbc_news()[:100]], 2_000)
    config = llama().config
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 2_048
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    type(llama())(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# The longest first, so that no process waits for it at the end.
@pytest.mark.parametrize("document", sorted(DOCUMENTS, key=steps_in, reverse=True), ids=lambda document: document.name)
def test_blocks_run(document: Path, tmp_path: Path, tiny_chat_model: Path) -> None:
    blocks = [block._replace(code=block.code.replace(SMOLLM, str(tiny_chat_model))) for block in blocks_of(document)]
    done = run(blocks, tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("block", SKIPPED, ids=lambda block: block.place)
def test_block_is_not_run(block: Block) -> None:
    pytest.skip(f"{block.place}: {block.skipped}")


@pytest.mark.parametrize("block", SETTINGS, ids=lambda block: block.place)
def test_settings_load(block: Block, tmp_path: Path) -> None:
    from tsqlora.settings import load_config

    if block.skipped:
        pytest.skip(block.skipped)
    (tmp_path / "tsq.yaml").write_text(block.code, encoding="utf-8")
    load_config(tmp_path / "tsq.yaml")


@pytest.mark.filterwarnings("ignore")  # of the Trainer, on a machine without a GPU
def test_the_blocks_of_readme_run_with_tiny_models_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not run as they stand, because the model and the rows are the reader's."""
    import torch
    from peft import LoraConfig
    from transformers import Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    import tsqlora as tsq
    from models import tiny_bert
    from words import llama, tokenizer

    monkeypatch.chdir(tmp_path)
    trainer, sft = [block.code for block in blocks_of(ROOT / "README.md") if block.language == "python"]
    rows = [{"input_ids": torch.randint(3, 20, (8,)), "labels": j % 2} for j in range(40)]
    args = TrainingArguments("out", max_steps=2, report_to="none", use_cpu=True)
    names = {"tsq": tsq, "Trainer": Trainer, "model": tiny_bert(), "rows": rows, "args": args, "tokenizer": tokenizer()}
    exec(trainer, names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()

    names |= {"chats": [{"prompt": f"w3 w{j % 20}", "completion": f" w{1 + j // 20}"} for j in range(40)]}
    names |= {"lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), "SFTTrainer": SFTTrainer}
    config = SFTConfig("sft", max_steps=2, report_to="none", use_cpu=True)
    exec(sft, names | {"model": llama(), "config": config})


SAMPLE = """
```python
x = 1
```
1. In a list:
   ```sh
   echo "from bash" > file.txt
   ```
```python
assert (x, open("file.txt").read()) == (1, "from bash\\n")
```
```bash no-run
exit 3
```
<!-- not run: needs a GPU -->
```python
raise SystemExit(4)
```
```yaml
model: {}
```
"""


def test_the_blocks_of_a_document_are_found_and_share_their_state(tmp_path: Path) -> None:
    document = tmp_path / "sample.md"
    document.write_text(SAMPLE)
    blocks = blocks_of(document)
    assert [block.language for block in blocks] == ["python", "bash", "python", "bash", "python", "yaml"]
    assert [block.skipped for block in blocks] == [None, None, None, "no-run", "needs a GPU", None]
    done = run(blocks, tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("block", ["python\n1 / 0", "bash\nfalse | true\necho on"])
def test_a_failing_block_fails(block: str, tmp_path: Path) -> None:
    document = tmp_path / "failing.md"
    document.write_text(f"```{block}\n```\n")
    assert run(blocks_of(document), tmp_path).returncode != 0
