"""The contract with typer: a failure here says which of its interfaces has changed."""

from typing import Annotated

import pytest
import typer

from tsqlora.libs.typer import UsageError

app = typer.Typer(add_completion=False)


@app.command()
def count(rows: int, least: Annotated[int, typer.Option(min=1)] = 1) -> int:
    if rows < 0:
        raise KeyboardInterrupt
    return rows


@app.command()
def stop() -> None:
    raise typer.Exit(5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("other", "other"),
        ("count", "rows"),
        ("count many", "rows"),
        ("count 1 2", "2"),
        ("count 1 --most 2", "--most"),
        ("count 1 --least 0", "--least"),
        ("count 1 --least", "--least"),
    ],
)
def test_a_wrong_command_line_raises_a_usage_error_that_names_the_part(arguments: str, named: str) -> None:
    with pytest.raises(UsageError) as refused:
        app(arguments.split(), standalone_mode=False)
    assert refused.value.exit_code == 2
    assert named in refused.value.format_message().lower()


@pytest.mark.parametrize(("arguments", "code"), [("count 3", 3), ("stop", 5), ("count -- -1", 130), ("--help", 0)])
def test_a_command_that_ends_gives_its_code(arguments: str, code: int) -> None:
    assert app(arguments.split(), standalone_mode=False) == code
