"""Writes docs/{cli,settings,moved}.md and settings/settings.yaml: python scripts/reference_pages.py [--check]"""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typer.main
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from tsqlora.cli.commands import app
from tsqlora.libs.yaml import dump_yaml
from tsqlora.moved import MOVED, what_of
from tsqlora.rows.rows import USUAL_LABEL, USUAL_PAIR, USUAL_TAGS, USUAL_TEXT, USUAL_TOKENS
from tsqlora.settings import REFUSED_ARGUMENTS, Config

DOCS = Path(__file__).parents[1] / "docs"
TEMPLATE = Path(__file__).parents[1] / "src" / "tsqlora" / "settings" / "settings.yaml"
EXAMPLE = {"model.path": "sentence-transformers/all-MiniLM-L6-v2", "data.train": "train.jsonl"}

CLI = """# Command line

<!-- Made by scripts/reference_pages.py from src/tsqlora/cli/. -->

`tsqlora COMMAND --help` shows the same in a terminal. Exit codes: 0 done, 1 failed while running, 2 wrong usage or
settings, 3 bad data, 4 a check that did not pass (`--strict`, `doctor`, `check`), 130 Ctrl-C, 143 SIGTERM. An error has
one or two lines: the thing, the value, and what to do. `--debug` after any command shows the traceback.

"""

SETTINGS = """# Settings

<!-- Made by scripts/reference_pages.py from src/tsqlora/settings/settings.py. -->

`tsqlora init` writes all of these with their defaults. Two are required, `model.path` and `data.train`; leave out what
you do not change. A misspelled name is an error that suggests the nearest one. `--dry-run`, run.json and
the report list settings that have no effect, such as `ranks.interval` where `ranks.policy` is `fixed`.
Numbers are YAML 1.2's: `5e-4` is a number, and `no` is text.

The learning rate matters most, for LoRA and for tsqlora: try three values on validation rows before anything else
(`tsqlora train tsq.yaml --set training.learning_rate=1e-3`). The last column says when to change a default.

{sections}
Further `training` settings are any field of `transformers.TrainingArguments` (`lr_scheduler_type`, `warmup_steps`,
`max_steps`, `gradient_accumulation_steps`, `eval_strategy`, `report_to` …), except those that another setting decides:

| not under `training` | instead |
| --- | --- |
{refused}

Some options are arguments of Python functions only (`weights`, `calibration`, `judge`, `depth`, `samples`
…): see `wrap`, and `score`, `ScoringRule`, `RankCallback` and `RankSchedule` of `tsqlora.paper`, in the [API](api.md).

## Detected columns

Where `data.text`, `data.text_pair` and `data.label` are not set, the first of these names that exists is used:

| | names |
| --- | --- |
| text | {text} |
| text, with its pair | {pairs} |
| label | {label} |
| tokens and tags (`token-classification`) | {tokens}; {tags} |
"""

NAMES = """# What moved

<!-- Made by scripts/reference_pages.py from src/tsqlora/moved.toml. -->

Each name of an earlier version, and what it is now; the old name is an error that says the same. A file of
settings that has a removed one at its former default still loads.

| before | now |
| --- | --- |
"""

WHEN = {
    "model.path": "always: any directory or hub id",
    "model.dtype": "bfloat16 for a large base, on hardware that has it",
    "model.quantization": "the base does not fit; with dtype bfloat16",
    "task.type": "labels are numbers, or the model writes text",
    "data.validation": "you have few rows, so that a tenth is a loss",
    "data.test": "you have test rows; they are measured once, and decide nothing",
    "data.trusted": "you have about 100 checked rows like those the model will meet",
    "data.text": "columns have unusual names",
    "data.label": "columns have unusual names",
    "data.max_length": "for speed: cost grows with tokens",
    "data.max_bad_rows": "many rows lack a text or label on purpose; 0 to be strict",
    "data.delimiter": "--dry-run shows a wrong one",
    "data.encoding": "--dry-run shows a wrong one",
    "quality.enabled": "false: a random control of as many steps, nothing scored",
    "quality.fraction": "1.0 for all rows; smaller for fewer steps (below 0.25 little was tried)",
    "quality.preset": "paper, to reproduce the published Q",
    "ranks.policy": "tsqlora, to see which layers matter",
    "ranks.mean": "more or less capacity; 4 to 16 for classifiers",
    "ranks.min": "0, to allow layers without an adapter",
    "adapter.alpha": "with ranks.mean, to keep the scale",
    "adapter.target_modules": "names such as [q_proj, v_proj], for a smaller adapter",
    "adapter.init_from": "you continue from an adapter",
    "training.epochs": "few rows need more; 1 is enough for many",
    "training.learning_rate": "always: the first thing to try",
    "training.batch_size": "memory",
    "training.seed": "to repeat a run with other draws",
}
"""When to change a default, in a user's words."""


def cli_page() -> str:
    return CLI + "\n".join(
        line for name, command in commands(typer.main.get_command(app)) for line in section(name, command)
    )


def commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its full name, commands of groups included."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def section(name: str, command: Any) -> Iterator[str]:
    """A command's help: what it does, its example, its arguments and options."""
    first, *more = (" ".join(part.split()) for part in command.help.split("\n\n"))
    examples = [part.removeprefix("Example: ") for part in more if part.startswith("Example: ")]
    yield from (f"## tsqlora {name}", "", first, "")
    yield from ("```bash no-run", *examples, "```", "")
    for paragraph in more[: -len(examples)]:
        yield from (paragraph, "")
    yield from ("| argument or option | | default |", "| --- | --- | --- |")
    for parameter in command.params:
        cells = (f"`{written(parameter)}`", parameter.help or "", default(parameter))
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
    yield ""


def written(parameter: Any) -> str:
    """An argument or option as a user types it.

    >>> option --set of a K.K=VALUE
    '--set K.K=VALUE'
    """
    if parameter.param_type_name == "argument":
        return parameter.metavar
    return " ".join([", ".join(parameter.opts), *filter(None, [parameter.metavar])])


def default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = "" if parameter.default is None or parameter.is_flag else str(parameter.default)
    return f"`{value}`" if value else ""


def settings_page() -> str:
    refused = "\n".join(f"| `{name}` | {cure} |" for name, cure in REFUSED_ARGUMENTS.items())
    pairs = ", ".join(f"`{first}` with `{second}`" for first, second in USUAL_PAIR.items())
    usual = (USUAL_TEXT, USUAL_LABEL, USUAL_TOKENS, USUAL_TAGS)
    text, label, tokens, tags = (", ".join(f"`{name}`" for name in names) for names in usual)
    sections = "\n".join(line for name, field in Config.model_fields.items() for line in settings_section(name, field))
    names = {"text": text, "pairs": pairs, "label": label, "tokens": tokens, "tags": tags}
    return SETTINGS.format(sections=sections, refused=refused, **names)


def settings_section(name: str, section: Any) -> Iterator[str]:
    """A table of one section: each setting with its values, its default, and when to change it."""
    yield from (f"## {name}", "", section.description, "")
    yield from ("| setting | what it is | values | default | when to change it |", "| --- | --- | --- | --- | --- |")
    for setting, field in section.annotation.model_fields.items():
        start = "required" if field.is_required() else f"`{dump_yaml(field.default, inline=True)}`"
        when = WHEN.get(f"{name}.{setting}", "")
        cells = (f"`{setting}`", field.description, allowed(field), start, when)
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
    yield ""


def settings_file() -> Iterator[str]:
    """What `tsqlora init` writes: every setting with its description, type and default."""
    yield "# Settings of a tsqlora run. A setting that is missing has its default."
    for name, section in Config.model_fields.items():
        yield from ("", f"# {section.description}", f"{name}:")
        for setting, field in section.annotation.model_fields.items():
            default = "required" if field.is_required() else f"default {dump_yaml(field.default, inline=True)}"
            value = dump_yaml(EXAMPLE.get(f"{name}.{setting}", field.default), inline=True)
            yield from (f"  # {field.description}", f"  {setting}: {value}  # {allowed(field)}; {default}")


WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[str]: "a list of texts",
    dict[str, float]: "a number for each term",
    types.NoneType: "null",
}
BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", ">="), Lt: ("lt", "<"), Le: ("le", "<=")}


def allowed(field: FieldInfo) -> str:
    """The values of a setting in words: 'a number > 0 and <= 1, or null'."""
    is_union = get_origin(field.annotation) in (Union, types.UnionType)
    members: tuple[Any, ...] = get_args(field.annotation) if is_union else (field.annotation,)
    first, *others = [
        " or ".join(map(str, get_args(member))) if get_origin(member) is Literal else WORDS[member]
        for member in members
    ]
    bounds = [
        f"{symbol} {getattr(bound, attribute)}"
        for kind, (attribute, symbol) in BOUNDS.items()
        for bound in field.metadata
        if isinstance(bound, kind)
    ]
    return ", or ".join([" ".join([first, " and ".join(bounds)]).strip(), *others])


def moved_page() -> str:
    names = {f"tsqlora {command}": now for command, now in MOVED["commands"].items()}
    names |= MOVED["settings"] | {f"tsqlora.{name}": now for name, now in MOVED["names"].items()} | MOVED["calls"]
    return NAMES + "".join(f"| `{old}` | {what_of(now).replace('|', chr(92) + '|')} |\n" for old, now in names.items())


def main() -> None:
    pages = {DOCS / "cli.md": cli_page(), DOCS / "settings.md": settings_page(), DOCS / "moved.md": moved_page()}
    pages[TEMPLATE] = "\n".join(settings_file()) + "\n"
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if stale and "--check" in sys.argv:
        sys.exit(f"stale: {', '.join(path.name for path in stale)}; run python scripts/reference_pages.py")
    for path in stale:
        path.write_text(pages[path], encoding="utf-8")


if __name__ == "__main__":
    main()
