"""The size of src and its surface: each figure of [tool.tsqlora.budget] in pyproject.toml may fall, and never rises.

`python tests/test_budget.py` prints today's figures.
"""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BUDGET: dict[str, int] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["tsqlora"]["budget"]


def statements(tree: ast.AST) -> int:
    """Count the statements of a module but for its texts: docstrings, also those of attributes.

    >>> statements(ast.parse("'''Say.'''\\nx: int = 1\\n'''What.'''\\nif x:\\n    print(x)"))
    3
    """
    return sum(isinstance(node, ast.stmt) and not _is_text(node) for node in ast.walk(tree))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def figures() -> dict[str, int]:
    """Measure what the budget bounds."""
    import tsqlora
    from tsqlora.run.config.settings import Config

    commands = [*_commands()]
    options = [one.name for command in commands for one in command.params if one.param_type_name == "option"]
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    trees = [ast.parse(text) for text in texts]
    return {
        "statements": sum(map(statements, trees)),
        "nodes": sum(1 for tree in trees for _ in ast.walk(tree)),
        "lines": sum(len(text.splitlines()) for text in texts),
        "files": len(texts),
        "commands": len(commands),
        "options": sum(name != "as_json" for name in options),
        "settings": sum(1 for _ in _settings(Config)),
        "public_names": len(tsqlora.__all__),
    }


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
def measured() -> dict[str, int]:
    return figures()


@pytest.mark.parametrize("name", BUDGET)
def test_a_figure_is_within_its_budget(name: str, measured: dict[str, int]) -> None:
    assert measured[name] <= BUDGET[name], f"{name}: {measured[name]:,} of {BUDGET[name]:,}"


if __name__ == "__main__":
    for name, figure in figures().items():
        print(f"{name:13} {figure:8,} of {BUDGET.get(name, 0):,}")
