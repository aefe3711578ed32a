"""The command line: parse, call, show; an error becomes one or two lines and an exit code."""

import os
import sys
import warnings
from typing import Annotated

import typer

from tsqlora.cli import adapters, console, reports, rows, runs
from tsqlora.errors import SettingsError, TsqLoraError, printable

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Every command has an example in its --help, and takes --debug to show where an error arose.",
    help="LoRA fine-tuning on imperfect rows: find wrong labels, train, and check adapters.",
)
for command in (
    runs.demo,
    runs.init,
    rows.audit,
    runs.train,
    rows.score,
    rows.explain,
    rows.select,
    rows.allocate,
    runs.evaluate,
    runs.predict,
    reports.report,
    reports.compare,
    adapters.export,
    adapters.doctor,
):
    app.command()(command)
MOVED = {
    "merge": "export --format merged",
    "adapter": "export --format compressed",
    "score --explain": "explain RUN|SCORES",
}
"""Commands and options of version 0.1, and where they are now."""

INTERRUPTED = 130
INTERRUPTION = "interrupted; a training goes on with --resume, a scoring or comparison when it is called again"


def main() -> None:
    """Runs the command line; an error becomes one or two lines and an exit code."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"] or ["--help"]
    # Under torchrun or accelerate every process runs this: the first one speaks.
    console.stdout.quiet = console.stderr.quiet = os.environ.get("RANK", "0") != "0"
    with warnings.catch_warnings():
        console.quieten_libraries(debug=debug)
        code = _run(arguments, debug=debug)
    sys.exit(code)


def _run(arguments: list[str], *, debug: bool) -> int:
    """The exit code."""
    try:
        _refuse_moved(arguments)
        # What typer ends has a number already: --help and Ctrl-C.
        code = app(arguments, standalone_mode=False) or 0
        if code == INTERRUPTED:
            console.note(INTERRUPTION)
        return code
    except typer.TyperException as error:
        console.error(f"{error.format_message().rstrip('.?')}; `tsqlora --help` and `tsqlora COMMAND --help` show how")
        return error.exit_code
    except TsqLoraError as error:
        console.error(str(error), debug=debug)
        return error.exit_code
    except Exception as error:
        said = str(error).strip()
        what = printable(f"{type(error).__name__}: {said.splitlines()[0] if said else 'without a word'}")
        console.error(f"{what}; --debug shows where", debug=debug)
        return 1


def _refuse_moved(arguments: list[str]) -> None:
    options = {argument.partition("=")[0] for argument in arguments[1:]}
    for old, new in MOVED.items():
        command, *gone = old.split()
        if command == arguments[0] and options.issuperset(gone):
            raise SettingsError(f"`tsqlora {old}` is gone; use `tsqlora {new}`")


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"tsqlora {version('tsqlora')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
