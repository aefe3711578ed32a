"""The size of the house and its surface: a figure of [tool.tsqlora.budget] in pyproject.toml may fall, and never rises.

`python tests/test_budget.py` prints today's figures.
"""

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import house

ROOT = Path(__file__).parents[1]
BUDGET: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["tsqlora"]["budget"]
WINGS: dict[str, int] = BUDGET.pop("wings")


def figures() -> dict[str, float]:
    """Measure what the budget bounds."""
    import tsqlora
    from tsqlora.settings.settings import Config

    commands = [*_commands()]
    options = [one.name for command in commands for one in command.params if one.param_type_name == "option"]
    modules = house.modules()
    return {
        **house.sizes(modules),
        **house.shape(modules),
        **{door: sum(house.reached(roots, modules).values()) for door, roots in house.doors(modules).items()},
        "test_lines": _lines("tests"),
        "bench_lines": _lines("bench"),
        "docs_words": sum(len(path.read_text(encoding="utf-8").split()) for path in (ROOT / "docs").rglob("*.md")),
        "commands": len(commands),
        "options": sum(name != "as_json" for name in options),
        "settings": sum(1 for _ in _settings(Config)),
        "public_names": len(tsqlora.__all__),
    }


def _lines(folder: str) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py"))


def _commands() -> Iterator[Any]:
    import typer

    from tsqlora.cli.commands import app

    root: Any = typer.main.get_command(app)
    yield from root.commands.values()


def _settings(model: Any, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from _settings(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    return figures()


@pytest.mark.parametrize("name", BUDGET)
def test_a_figure_is_within_its_budget(name: str, measured: dict[str, float]) -> None:
    assert measured[name] <= BUDGET[name], f"{name}: {measured[name]:,} of {BUDGET[name]:,}"


def test_each_wing_keeps_its_statements() -> None:
    counts = house.wings(house.modules())
    assert counts.keys() == WINGS.keys(), "pyproject.toml names the wings"
    assert {name: n for name, n in counts.items() if n > WINGS[name]} == {}


if __name__ == "__main__":
    for name, figure in figures().items():
        print(f"{name:20} {figure:10,.0f} of {BUDGET.get(name, 0):,}")
    for name, figure in sorted(house.wings(house.modules()).items()):
        print(f"  {name:18} {figure:10,} of {WINGS.get(name, 0):,}")
