"""What `tsqlora` imports before it has work, which is what a user waits for, and completion in the shell."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import openpyxl
import pytest

from runs import run_cli
from tsqlora.cli.commands import app

ADAPTER = Path(__file__).parents[1] / "fixtures" / "v0.1" / "run" / "adapter"
NUMPY = {"huggingface_hub", "numpy", "regex", "safetensors"}
"""What the doctor reads an adapter with."""
TORCH = {"accelerate", "datasets", "jinja2", "pandas", "peft", "pyarrow", "scipy", "sklearn", "torch", "transformers"}

SCRIPT = """
import sys
from tsqlora.cli import main
try:
    main()
finally:
    print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""
EACH = """
import json, sys
from tsqlora.cli import main
for sys.argv in json.loads(sys.argv[1]):
    try:
        main()
    except SystemExit as ended:
        heavy = {"torch", "transformers", "peft"} & sys.modules.keys()
        print(f"<{ended.code} {heavy or ''}>", file=sys.stderr)
"""


def test_python_runs_the_package() -> None:
    done = subprocess.run([sys.executable, "-m", "tsqlora", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("tsqlora "), done.stderr


def test_help_lists_each_command_with_its_whole_first_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run_cli(capsys, "--help")
    text = " ".join(out.split())
    for command in app.registered_commands:
        assert " ".join((command.callback.__doc__ or "").partition("\n\n")[0].split()) in text, command.callback


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        (["--help"], NUMPY | TORCH | {"rich", "pydantic", "yaml"}),
        (["--version"], NUMPY | TORCH),
        (["doctor", "--help"], NUMPY | TORCH),
        (["init"], {"torch", "transformers", "peft"}),
        (["doctor", str(ADAPTER)], TORCH),
    ],
)
def test_a_light_command_imports_no_heavy_library(arguments: list[str], unused: set[str]) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not unused & set(done.stderr.split())


MISTAKES = [
    (["train", "--model", "./no", "--data", "no.csv"], "./no"),
    (["train", "--model", ".", "--data", "no.csv"], "no.csv"),
    (["train", "--model", ".", "--data", ".", "--set", "data.trusted=no.csv"], "no.csv"),
    (["audit", "no.csv"], "no.csv"),
    (["audit", ".", "--model", "./no"], "./no"),
    (["audit", "no.yaml"], "no.yaml"),
    (["audit", "c.yaml"], "no.csv"),
    (["score", "no.yaml", "--out", "s.parquet"], "no.yaml"),
    (["audit", "t.ods"], "save it as .xlsx"),
    (["audit", "t.xlsx"], "set data.sheet=One"),
    (["train", "--model", ".", "--data", "t.txt"], "extension '.txt' is unknown"),
    (["audit", "t.csv", "--set", "data.txet=x"], "did you mean 'text'"),
    (["train", "t.csv", "--model", ".", "--set", "training.lerning_rate=1"], "did you mean 'learning_rate'"),
    (["audit", "chats.jsonl.gz"], "give --model M"),
    (["audit", "chats", "--no-model"], "give --model M"),
    (["audit", "chats.jsonl.gz", "--model", ".", "--eval", "no.jsonl"], "no.jsonl"),
    (["audit", "--prepared", ".", "--data", "no.jsonl", "--model", "."], "no.jsonl"),
]


def test_a_mistake_is_named_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: {path: .}\ndata: {train: no.csv}\n")
    for name in ("t.ods", "t.txt"):
        (tmp_path / name).write_bytes(b"PK")
    (tmp_path / "t.csv").write_text("text,label\na,b\n")
    (tmp_path / "chats").mkdir()
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    (tmp_path / "chats" / "train.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (tmp_path / "chats.jsonl.gz").write_bytes(gzip.compress((tmp_path / "chats" / "train.jsonl").read_bytes()))
    book = openpyxl.Workbook()
    for sheet in (book.worksheets[0], book.create_sheet()):
        sheet.append(["text", "label"])
    book.worksheets[0].title = "One"
    book.save(tmp_path / "t.xlsx")
    calls = [["tsqlora", *arguments] for arguments, _ in MISTAKES]
    done = subprocess.run([sys.executable, "-c", EACH, json.dumps(calls)], cwd=tmp_path, capture_output=True, text=True)
    messages = re.split(r"<[123] >\n", done.stderr)
    for (arguments, named), message in zip(MISTAKES, messages[:-1], strict=True):
        assert named in message.replace("\n", ""), arguments


@pytest.mark.parametrize(("typed", "completed"), [("tsqlora expo", "export"), ("tsqlora export --for", "--format")])
def test_the_shell_completes_commands_and_options(typed: str, completed: str) -> None:
    environment = {"_TSQLORA_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    script = "import sys; sys.argv = ['tsqlora']; from tsqlora.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True)
    assert done.stdout.split() == [completed]


def test_a_reader_that_closes_the_pipe_sees_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", "from tsqlora.cli import main; main()", "init"], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("train c.yaml --epochs 3", "--set training.epochs=3"),
        ("train c.yaml -r3", "--set ranks.mean=…"),
        ("train c.yaml --lr=1e-4", "--set training.learning_rate=1e-4"),
        ("train c.yaml --batch-size 8", "--set training.batch_size=8"),
        ("audit rows.csv --lable kind", "--set data.label=kind"),
        ("audit rows.csv --data.label 'a b'", "--set 'data.label=a b'"),
        ("train c.yaml --fraction", "--set quality.fraction=…"),
    ],
)
def test_an_unknown_option_that_is_a_setting_is_named_as_such(
    words: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_cli(capsys, *shlex.split(words))
    assert (code, f"did you mean {hint}?" in err) == (2, True), err


@pytest.mark.parametrize(("words", "near"), [("train --modle m", "--model"), ("export run --label x", "--label")])
def test_another_unknown_option_keeps_its_own_message(
    words: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_cli(capsys, *words.split())
    assert (code, near in err, "--set" in err) == (2, True, False)
