"""Finds the old voice in src/, tests/, bench/, README and docs/: python scripts/plain_english.py [--list] [PATH ...]

The rule is that of CONVENTIONS: plain English in docstrings, comments, messages and names. `told`, `known`, `given` and
the like are verbs, not nouns or names. Pages are checked outside of their code, research notes not at all.
scripts/plain_english.json has how many each package may still have; a
count may fall and not grow, and `--list` shows each place.
"""

import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CHECKED = (ROOT / "src" / "tsqlora", ROOT / "tests", ROOT / "bench", ROOT / "README.md", ROOT / "docs")
ALLOWED = Path(__file__).with_suffix(".json")

NAMES = re.compile(r"_*(told|known|found|asked|wanted|said|kept|given|anew)s?_*")
"""Names that are such a word and nothing else."""
WORDS = re.compile(
    r"\banew\b|\b(?:of|by) (?:\w+ )?(?:one's|its|their|his) own\b(?=[.,;:)]|$)|\bof one's own\b|\btold\b(?! apart)"
    r"|\b(?:refus\w+|raised|named|asked|told) by name\b"
    r"|\b(?:the|what|which|that|those|all|is|are|was|were|not|as|if|where|be) (?:is |are |was |were |be )?"
    r"(?:asked|wanted|said)(?: for)?\b|\b(?:the|what is|what was) (?:known|found|kept|given|asked|wanted|said|told)\b"
    r"|\b(?:asks?|knows|know|says?) (?:nothing|no|of)\b"
    r"|\bbeside (?:plain )?(?:LoRA|PEFT|cleanlab|Soup)\b"
    r"|\b(?:is|are|was|were|be|about|least|ends?|ended|stays?) level\b"
    r"|\bto be had\b|\b[Mm]eanwhile\b|\bsignal is an error\b|\bin the manner of\b"
)
"""The same words where they stand for a noun, and phrases of the old voice."""

CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
"""Code in a page."""


class Finding(NamedTuple):
    path: str
    line: int
    what: str


def findings(path: Path, text: str) -> Iterator[Finding]:
    """Every place of one file: names, and words in docstrings, comments and messages."""
    where = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    if path.suffix == ".md":
        for number, line in enumerate(CODE.sub(lambda code: "\n" * code[0].count("\n"), text).splitlines(), start=1):
            yield from (Finding(where, number, f"'{match[0]}' in: {line[:80]}") for match in WORDS.finditer(line))
        return
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                pass
            case ast.Name(id=name, ctx=ast.Store()):
                pass
            case ast.Constant(value=str(value)) if " " in value:  # one word is a key, not a sentence
                for match in WORDS.finditer(" ".join(value.split())):
                    yield Finding(where, node.lineno, f"'{match[0]}' in: {' '.join(value.split())[:80]}")
                continue
            case _:
                continue
        if NAMES.fullmatch(name.lower()):
            yield Finding(where, node.lineno, f"the name {name}")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and (match := WORDS.search(token.string)):
            yield Finding(where, token.start[0], f"'{match[0]}' in: {token.string[:80]}")


def package(path: str) -> str:
    """The package of a count: `run` of `src/tsqlora/training/command.py`, else the top folder."""
    folder, *rest = Path(path).parts
    return rest[1] if folder == "src" and len(rest) > 2 else folder if rest and folder != "src" else "."


def _files(name: Path) -> list[Path]:
    """A file, or the modules and pages of a folder."""
    return [name] if name.is_file() else sorted([*name.rglob("*.py"), *name.glob("*.md")])


def main() -> None:
    names = [Path(name) for name in sys.argv[1:] if not name.startswith("--")] or [*CHECKED]
    files = [file for name in names for file in _files(name)]
    everything = [finding for file in files for finding in findings(file.resolve(), file.read_text(encoding="utf-8"))]
    if "--list" in sys.argv:
        print(*(f"{f.path}:{f.line}: {f.what}" for f in everything), sep="\n")
        return
    counts = dict(sorted(Counter(package(finding.path) for finding in everything).items()))
    if "--write" in sys.argv:
        ALLOWED.write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
        return
    allowed = json.loads(ALLOWED.read_text(encoding="utf-8"))
    if worse := {name: count for name, count in counts.items() if count > allowed.get(name, 0)}:
        more = ", ".join(f"{name} has {count}, allowed are {allowed.get(name, 0)}" for name, count in worse.items())
        sys.exit(f"old voice: {more}; python scripts/plain_english.py --list shows where")


if __name__ == "__main__":
    main()
