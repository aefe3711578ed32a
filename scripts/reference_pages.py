"""Writes docs/cli.md and docs/all-settings.md from the source: python scripts/reference_pages.py [--check]"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from tsqlora.cli.commands import app
from tsqlora.data.columns import USUAL_LABEL, USUAL_PAIR, USUAL_TEXT
from tsqlora.run.config import REFUSED_ARGUMENTS, template

DOCS = Path(__file__).parents[1] / "docs"

CLI = """# Command line

<!-- Made by scripts/reference_pages.py from src/tsqlora/cli/. -->

`tsqlora COMMAND --help` says the same in a terminal. Exit codes: 0 done, 1 failed while running, 2 wrong usage or
settings, 3 bad data, 130 Ctrl-C, 143 SIGTERM. An error is one or two lines: the thing, the value, the cure; `--debug`
after any command shows where it arose.

"""

SETTINGS = """# All settings

<!-- Made by scripts/reference_pages.py from src/tsqlora/run/config/settings.py. -->

This is what `tsqlora init` writes: every setting with what it takes and its default. Two are required, `model.path`
and `data.train`; leave out what you do not change. [Choosing settings](settings.md) says which of them matter. A name
that does not exist is an error, which names the nearest one. Numbers are YAML 1.2's: `5e-4` is a number, and `no` is
text.

```yaml
{template}```

Under `training` any field of `transformers.TrainingArguments` may stand as well, but for those that another setting
decides:

| not under `training` | instead |
| --- | --- |
{refused}

## Columns that are found by themselves

Where `data.text`, `data.text_pair` and `data.label` are not set, the first of these names that is there is taken:

| | names |
| --- | --- |
| text | {text} |
| text, with its pair | {pairs} |
| label | {label} |
"""


def cli_page() -> str:
    return CLI + "\n".join(
        line for name, command in commands(typer.main.get_command(app)) for line in section(name, command)
    )


def commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its whole name; of a group those in it."""
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
    """How an argument or option is written.

    >>> option --set of a K.K=VALUE
    '--set K.K=VALUE'
    """
    if parameter.param_type_name == "argument":
        return parameter.metavar
    return " ".join([", ".join(parameter.opts), *filter(None, [parameter.metavar])])


def default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    said = "" if parameter.default is None or parameter.is_flag else str(parameter.default)
    return f"`{said}`" if said else ""


def settings_page() -> str:
    refused = "\n".join(f"| `{name}` | {cure} |" for name, cure in REFUSED_ARGUMENTS.items())
    pairs = ", ".join(f"`{first}` with `{second}`" for first, second in USUAL_PAIR.items())
    text, label = (", ".join(f"`{name}`" for name in names) for names in (USUAL_TEXT, USUAL_LABEL))
    return SETTINGS.format(template=template(), refused=refused, text=text, pairs=pairs, label=label)


def main() -> None:
    pages = {DOCS / "cli.md": cli_page(), DOCS / "all-settings.md": settings_page()}
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if stale and "--check" in sys.argv:
        sys.exit(f"stale: {', '.join(path.name for path in stale)}; run python scripts/reference_pages.py")
    for path in stale:
        path.write_text(pages[path], encoding="utf-8")


if __name__ == "__main__":
    main()
