"""Writes the table of errors in docs/errors.md from the source: python scripts/error_table.py [--check]

A message has the thing, the value, and behind its last semicolon the cure; … stands for what varies.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE, PAGE = ROOT / "src" / "tsqlora", ROOT / "docs" / "errors.md"
START, END = "<!-- errors: made by scripts/error_table.py -->", "<!-- end -->"
ERRORS = ("DataError", "NoColumnError", "SettingsError", "UnsupportedError", "TsqLoraError", "TemplateError", "fail")
PARTS = {
    "Rows and their files": ("data/",),
    "Settings and commands": ("run/config/", "run/job.py", "run/train.py", "run/fit.py", "run/score.py"),
    "Models and tokenizers": (
        "compat/hub.py",
        "training/load.py",
        "training/predict.py",
        "tasks/classification.py",
        "tasks/reading.py",
    ),
    "Run directories and resuming": ("training/run_dir.py", "training/checkpoints.py"),
    "Audit and review": ("run/audit.py", "run/review.py"),
}
"""What a user of the commands meets, by the module that raises it."""


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """Message and cure of each error that a module raises, where its text says both."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[said, *_]) if name in ERRORS:
                pass
            case _:
                continue
        match said:
            case ast.Constant(value=str(text)):
                pass
            case ast.JoinedStr(values=parts):
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
            case _:
                continue
        what, _, cure = text.rpartition("; ")
        if what.strip("…: ") and len(cure.replace("…", "").split()) > 1:
            yield what, cure


def cell(text: str) -> str:
    return text.removeprefix("…: ").replace("|", "\\|").replace("`", "").replace("<", "&lt;")


def table() -> str:
    lines = list[str]()
    for title, modules in PARTS.items():
        paths = sorted(path for module in modules for path in (SOURCE / module).rglob("*.py"))
        paths += [SOURCE / module for module in modules if module.endswith(".py")]
        rows = dict.fromkeys(row for path in paths for row in messages(path))
        lines += [f"\n### {title}\n", "| message | what to do |", "| --- | --- |"]
        lines += [f"| {cell(what)} | {cell(cure)} |" for what, cure in sorted(rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    made = f"{before}{START}\n{table()}\n{END}{rest.split(END, 1)[1]}"
    if "--check" in sys.argv:
        if made != page:
            sys.exit("docs/errors.md is not that of the source; python scripts/error_table.py writes it")
        return
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
