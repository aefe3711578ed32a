"""The interface of typer that differs between versions."""

from typing import Any

import typer

# Up to 0.25 it is click's; then it is of a private module, with a public base from 0.28 on.
UsageError: Any = typer.BadParameter.__base__
"""Base of all errors that typer raises for a wrong command line."""
