"""Benchmarks run seldom: what they import of tsqlora must be there when they do."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parents[2].glob("bench/**/*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_a_benchmark_imports_exists(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tsqlora":
            module = importlib.import_module(str(node.module))
            for name in node.names:
                submodule = (
                    importlib.util.find_spec(f"{node.module}.{name.name}") if hasattr(module, "__path__") else None
                )
                assert hasattr(module, name.name) or submodule, f"{file.name}:{node.lineno}: {node.module}.{name.name}"
