"""The template's contract: whether another chat template gives the prompts that a model was trained on.

A run's template.json has the training template, five rendered prompts and their tokens. Here jinja2 renders these with
the other template, in a process with limits, since a template is a program of whoever wrote it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsqlora.errors import DataError
from tsqlora.files import reading
from tsqlora.libs.hub import cached_model

CONTRACT_FILE = "template.json"
SECONDS, BYTES = 10, 1 << 30
"""Time and memory of the process that renders."""
CHARACTERS = 1_000_000
"""Most characters of a rendered prompt."""
SHOWN = 6
"""Tokens from the first that differs on."""

RENDER = f"""
import json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
    resource.setrlimit(resource.RLIMIT_AS, ({BYTES}, {BYTES}))
except (ImportError, ValueError, OSError):
    pass  # where there are no limits the parent still has its clock
from datetime import datetime
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    tags = {{"generation"}}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def refuse(message):
    raise TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


given = json.load(sys.stdin)
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
)
environment.filters["tojson"] = tojson
environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
try:
    template = environment.from_string(given["template"])
    texts = [template.render(add_generation_prompt=True, **given["special"], **one) for one in given["prompts"]]
    if any(len(text) > {CHARACTERS} for text in texts):
        refuse("a prompt has more than {CHARACTERS:,} characters")
    print(json.dumps({{"texts": texts}}))
except Exception as error:
    print(json.dumps({{"error": f"{{type(error).__name__}}: {{error}}"}}))
"""


def read_contract(source: Path) -> dict[str, Any]:
    """Read the contract of a run, or of the run that an adapter lies in.  Raises DataError where there is none."""
    for folder in (source, source.parent):
        if (path := folder / CONTRACT_FILE).is_file():
            try:
                contract = json.loads(path.read_text(encoding="utf-8"))
                needed = {"base", "template", "special_tokens", "stop_tokens", "stops_trained"}
                if not needed <= contract.keys() or not all(
                    isinstance(one["text"], str) and "messages" in one for one in contract["prompts"]
                ):
                    raise ValueError("a part is missing")
                return contract
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise DataError(f"{path} is damaged ({error}); `tsqlora train` writes it") from None
    raise DataError(f"{source} has no {CONTRACT_FILE}, which `tsqlora train` writes for models with a chat template")


def read_template(file: Path) -> str:
    """Read a chat template.  Raises DataError for a file that is no text."""
    reading(file)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no UTF-8"
        raise DataError(f"{file} cannot be read ({why}); name a text file with a chat template") from None


def render(template: str, contract: Mapping[str, Any]) -> list[str]:
    """Render the contract's prompts with a template.  Raises DataError where it fails, or takes too long."""
    prompts = [{"messages": one["messages"], "tools": one.get("tools")} for one in contract["prompts"]]
    request = json.dumps({"template": template, "special": contract["special_tokens"], "prompts": prompts})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", RENDER], input=request, capture_output=True, text=True, timeout=2 * SECONDS
        )
        answer = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        raise DataError(f"the template takes more than {SECONDS} seconds or too much memory; correct it") from None
    if "error" in answer:
        raise DataError(f"the template fails ({answer['error'][:300]}); correct it")
    return answer["texts"]


def compare_template(source: Path, file: Path) -> dict[str, Any]:
    """Render the contract of a run with a template, and find the first token that differs.

    Returns `same` of `prompts`, and `first`: prompt, place, and the tokens from there on, or the text where the base's
    tokenizer.json is not on this machine; None if all are the same.
    """
    contract = read_contract(source)
    texts = render(read_template(file), contract)
    trained = [one["text"] for one in contract["prompts"]]
    differ = [j for j, (own, other) in enumerate(zip(trained, texts, strict=True)) if own != other]
    first = None
    if differ:
        own, other = _pieces(contract, trained[differ[0]]), _pieces(contract, texts[differ[0]])
        at = next((k for k, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
        parts = ("".join(pieces[at : at + SHOWN]) for pieces in (own, other))
        first = {"prompt": differ[0], "at": at, **dict(zip(("trained", "other"), parts, strict=True))}
    about = {"prompts": len(texts), "same": len(texts) - len(differ), "first": first}
    return {**about, "stops": contract["stop_tokens"], "stops_trained": contract["stops_trained"]}


def _pieces(contract: Mapping[str, Any], text: str) -> list[str]:
    """The text as its tokens, else as its characters."""
    from tokenizers import Tokenizer

    base = str(contract["base"])
    folder = base if os.path.isdir(base) else cached_model(base, "main")  # a name may be too long for a path
    if folder is None or not (path := Path(folder) / "tokenizer.json").is_file():
        return list(text)
    encoding = Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False)
    return [text[start:end] for start, end in encoding.offsets]
