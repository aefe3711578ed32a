"""The command line: parse, call, show; an error becomes one or two lines and an exit code."""

import sys
import warnings
from difflib import get_close_matches
from shlex import quote
from typing import Annotated, Any

import typer

from tsqlora.cli import console, results, rows, runs
from tsqlora.errors import TsqLoraError, printable
from tsqlora.libs.typer import UsageError
from tsqlora.moved import MOVED, refuse_commands

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes a tenth of a second to import
    epilog="The --help of every command has an example; --debug after any command shows the traceback.",
    help="LoRA fine-tuning on imperfect rows: find wrong labels, train, and check adapters.",
)
for command in (
    runs.demo,
    runs.init,
    rows.audit,
    rows.apply,
    runs.look,
    runs.train,
    rows.score,
    rows.explain,
    rows.select,
    runs.evaluate,
    runs.predict,
    results.report,
    results.export,
    results.doctor,
    results.check,
):
    app.command(short_help=" ".join((command.__doc__ or "").partition("\n\n")[0].split()))(command)

INTERRUPTED = 130
AFTER_INTERRUPTION = {
    "train": "; the same command with --resume continues from the last complete checkpoint, or starts if there is none",
    "score": "; the same command continues it",
    "audit": "; the same command starts again",
}


def main() -> None:
    """Run the command line; an error becomes one or two lines and an exit code."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"] or ["--help"]
    console.terminal.cache_clear()  # RANK may be another one since the last call
    with warnings.catch_warnings():
        console.quieten_libraries(debug=debug)
        code = _run(arguments, debug=debug)
    sys.exit(code)


def _run(arguments: list[str], *, debug: bool) -> int:
    """The exit code."""
    try:
        refuse_commands(arguments)
        # typer returns a code for --help and Ctrl-C.
        code = app(arguments, standalone_mode=False) or 0
        if code == INTERRUPTED:
            console.note(f"interrupted{AFTER_INTERRUPTION.get(arguments[0], '')}")
        return code
    except UsageError as error:
        problem = _as_setting(error, arguments) or error.format_message().rstrip(".?")
        console.error(f"{problem}; see `tsqlora --help` and `tsqlora COMMAND --help`")
        return error.exit_code
    except TsqLoraError as error:
        console.error(str(error), debug=debug)
        return error.exit_code
    except Exception as error:
        message = str(error).strip()
        what = printable(f"{type(error).__name__}: {message.splitlines()[0] if message else 'no message'}")
        console.error(f"{what}; --debug shows where", debug=debug)
        return 1


def _as_setting(error: Any, arguments: list[str]) -> str | None:
    """The message for an unknown option that is a setting by its name, or nearly so; None for others."""
    option, own = getattr(error, "option_name", None), error.ctx.command.params if error.ctx else ()
    if option is None or not any("--set" in one.opts for one in own):
        return None
    from tsqlora.settings.file import keys as settings

    keys = settings() | {key: key for key in settings().values()} | MOVED["elsewhere"]
    name = option.strip("-").replace("-", "_")
    options = [word.strip("-") for one in own for word in one.opts]
    if name not in keys:
        near = get_close_matches(name, [] if get_close_matches(name, options, cutoff=0.8) else keys, n=1, cutoff=0.7)
        if not near:
            return None
        name = near[0]
    after = iter(arguments)
    _, equals, value = next((word for word in after if word.partition("=")[0] == option), "").partition("=")
    value = value if equals else next(after, "")  # none behind -r3
    setting = f"{keys[name]}=…" if value.startswith("-") or not value else quote(f"{keys[name]}={value}")
    return f"No such option: {option}; did you mean --set {setting}?"


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
